"""EVLGen's video processor: videos in, pixels of their frames out."""

import os
from itertools import islice
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor

from configuration_evlgen.hub_code import AUTO_MAP

from .images import MAX_PIXELS
from .videos import FrameChoice, iterate_rgb_frames

FRAMES_AT_ONCE = 8  # that are prepared together; all decoded frames of a video may not fit into memory


class EVLGenVideosKwargs(VideosKwargs, total=False):
    max_pixels: int | None
    frame_sampling: str | None
    num_frames: Any  # `FrameChoice` checks these, and names them
    fps: Any


# Settings of pixels, which the image processor knows as well.
_PIXEL_SETTINGS = (VideosKwargs.__annotations__.keys() & ImagesKwargs.__annotations__.keys()) - {"return_tensors"}


class EVLGenVideoProcessor(BaseVideoProcessor):
    """
    Reads videos, chooses frames, and prepares these as images.

    Args:
        image_processor (`BaseImageProcessor`, *optional*): `from_pretrained` loads it from the same checkpoint.
        kwargs:
            - `num_frames` (`int`, defaults to 4): Frames taken of each video, at most 512.
            - `fps` (`float`, *optional*): Frames taken for each second of a video, instead of `num_frames`.
            - Settings of the image processor that are others for videos, such as `do_normalize`.
    """

    model_input_names = ["pixel_values_videos", "frame_mask", "frame_times", "video_budgets"]  # vLLM reads them
    valid_kwargs = EVLGenVideosKwargs
    num_frames = 4
    do_sample_frames = True  # so vLLM gives the times of frames
    temporal_patch_size = 1  # vLLM reads it
    default_to_square = None  # as the image processor's, like all settings that are not given
    rescale_factor = None

    def __init__(self, image_processor: BaseImageProcessor | None = None, **kwargs: Unpack[EVLGenVideosKwargs]):
        super().__init__(**kwargs)
        self.image_processor = image_processor
        self.auto_map = {"AutoVideoProcessor": AUTO_MAP["AutoVideoProcessor"]}
        FrameChoice(**self.frames)  # raises out of range

    @property
    def frames(self) -> dict[str, Any]:
        """Which frames a call takes by default: `num_frames` or `fps`."""
        return {"num_frames": self.num_frames} if self.fps is None else {"fps": self.fps}

    @property
    def size(self) -> Any:
        """The size of frames. vLLM reads it; where videos have none of their own, it is the image processor's."""
        own = self.__dict__.get("size")
        return getattr(getattr(self, "image_processor", None), "size", None) if own is None else own

    @size.setter
    def size(self, size: Any) -> None:
        self.__dict__["size"] = size

    def preprocess(self, videos: Any, **kwargs: Unpack[EVLGenVideosKwargs]) -> BatchFeature:
        """
        Args:
            videos (video, path, URL or a list of these):
                A list of frames (images or arrays) is one video. [`load_rgb_frames`] lists the accepted types.
            kwargs:
                - `num_frames` (`int`) or `fps` (`float`): As for the class.
                - `do_sample_frames` (`bool`): False takes all frames, at most 512, if there is neither of these.
                - `frame_sampling` (`str`): `"uniform"` (the default), or `"headtail"`; see [`sample_frames`].
                - `video_metadata` (`VideoMetadata`, `dict` or a list of these): As `metadata` of [`load_rgb_frames`].
                - `max_pixels` (`int`): Largest width times height of a frame that is decoded.
                - Settings of the image processor.

        Returns:
            `BatchFeature` with `pixel_values_videos`, float32, `(videos, frames, channels, height, width)`;
            `frame_times`, float32, `(videos, frames)`, the seconds of each frame since the first one; and
            `frame_mask`, bool, `(videos, frames)`, if frames of zeros pad short videos.
        """
        videos, metadata = flatten_videos(videos), _flatten_metadata(kwargs.get("video_metadata"))
        if metadata and len(metadata) != len(videos):
            raise ValueError(f"`video_metadata` has {len(metadata)} entries for {len(videos)} videos.")
        given = {name: value for name, value in kwargs.items() if value is not None}
        frames = {name: given[name] for name in ("num_frames", "fps") if name in given}
        if not frames and given.get("do_sample_frames", self.do_sample_frames):
            frames = self.frames
        choice = FrameChoice(**frames, sampling=given.get("frame_sampling", "uniform"))
        settings = {name: given[name] for name in _PIXEL_SETTINGS & given.keys()}
        parts, times = [], []
        for video, row in zip(videos, metadata or [None] * len(videos), strict=True):
            chosen = iterate_rgb_frames(video, choice, given.get("max_pixels", MAX_PIXELS), row)
            times.append([])
            while part := list(islice(chosen, FRAMES_AT_ONCE)):
                images, seconds = zip(*part, strict=True)
                parts.append(self.prepare_frames(list(images), **settings))
                times[-1] += seconds
        return BatchFeature(_pad(torch.cat(parts), times), tensor_type=given.get("return_tensors"))

    def prepare_frames(self, frames: list[Any], **settings: Any) -> torch.Tensor:
        """Pixels of frames that were read, `(frames, channels, height, width)`."""
        own = {name: value for name, value in self.__dict__.items() if name in _PIXEL_SETTINGS and value is not None}
        # An image processor takes sizes as it is given them, and not as it keeps them.
        own = {name: dict(value) if isinstance(value, SizeDict) else value for name, value in own.items()}
        settings = {**own, **settings}
        return self.image_processor(frames, **settings, return_tensors="pt")["pixel_values"]

    def to_dict(self) -> dict[str, Any]:
        """What is saved. The image processor is saved by itself."""
        settings = super().to_dict()
        settings.pop("image_processor", None)
        return settings

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "EVLGenVideoProcessor":
        """Loads the video processor and the image processor of a checkpoint."""
        video_processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        video_processor.image_processor = AutoImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return video_processor


def flatten_videos(videos: Any) -> list[Any]:
    """Videos, lists of videos and 5-D arrays, nested in any way, as one list. A list of frames is one video.

    transformers' `make_batched_videos` drops `Path`s and rows of data sets, and refuses frames of different sizes.
    """
    if isinstance(videos, list | tuple):
        if len(videos) and (isinstance(videos[0], Image.Image) or getattr(videos[0], "ndim", None) == 3):
            return [videos]
        parts = [flatten_videos(entry) for entry in videos]
        # Beside lists of videos, an empty list is a text without videos. Otherwise it is a video without frames.
        if not any(part and part[0] is not entry for part, entry in zip(parts, videos, strict=True)):
            parts = [part or [entry] for part, entry in zip(parts, videos, strict=True)]
        return [video for part in parts for video in part]
    return list(videos) if getattr(videos, "ndim", None) == 5 else [videos]  # (videos, frames, height, width, 3)


def _flatten_metadata(metadata: Any) -> list[Any]:
    if isinstance(metadata, list | tuple):
        return [entry for row in metadata for entry in _flatten_metadata(row)]
    return [] if metadata is None else [metadata]


def _pad(pixels: torch.Tensor, times: list[list[float]]) -> dict[str, torch.Tensor]:
    """The frames of all videos, `(frames, channels, height, width)`, as one tensor, with their times and a mask."""
    lengths = [len(row) for row in times]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # (videos, frames)
    padded = pixels.new_zeros(*mask.shape, *pixels.shape[1:])  # (videos, frames, channels, height, width)
    padded[mask] = pixels
    since_first = torch.zeros(mask.shape)  # (videos, frames)
    # Subtracted in float64: a camera may count from 1970.
    since_first[mask] = torch.tensor([time - row[0] for row in times for time in row])
    data = {"pixel_values_videos": padded, "frame_times": since_first}
    return data if mask.all() else {**data, "frame_mask": mask}
