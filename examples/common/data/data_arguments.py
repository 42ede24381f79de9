"""Arguments of the scripts: which data to read, and how."""

from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from common.command_line import check_count
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import MAX_PIXELS
from processing_evlgen.videos import FrameChoice


@dataclass
class FrameArguments:
    num_frames: int | None = HfArg(
        default=None,
        help="Frames taken from each video, at equal distances, at most 512. Default: the num_frames or fps that the "
        "model was saved with.",
    )
    fps: float | None = HfArg(default=None, help="Frames taken for each second of a video, instead of num_frames.")

    def __post_init__(self) -> None:
        if self.num_frames is not None:
            check_count("num_frames", self.num_frames, 1)
        FrameChoice(num_frames=self.num_frames, fps=self.fps)  # raises out of range, or if both are given

    @property
    def frames(self) -> dict[str, float]:
        """Which frames of a video are read, as arguments of `load_rgb_frames`. By default 4, as a new processor's."""
        return {"num_frames": self.num_frames or 4} if self.fps is None else {"fps": self.fps}

    def complete_frames(self, processor: EVLGenProcessor) -> None:
        """Takes over the processor's choice of frames, if none is given. A given one becomes the processor's."""
        videos = processor.video_processor
        if self.num_frames is None and self.fps is None:
            self.fps = videos.fps
            self.num_frames = videos.num_frames if videos.fps is None else None
        videos.fps, videos.num_frames = self.fps, self.num_frames or videos.num_frames


@dataclass
class DataArguments(FrameArguments):
    dataset: str | None = HfArg(
        default=None,
        help="openmoji-scenes, crowded-scenes, easy-vqa, or what `datasets.load_dataset` takes: a "
        "folder with metadata, a name on the Hub, or imagefolder, parquet, json, csv or webdataset together with "
        "data_files.",
    )
    data_files: dict[str, Any] | str | None = HfArg(
        default=None, help="Files or patterns of each split; JSON on the command line."
    )
    dataset_config: str | None = HfArg(default=None, help="Configuration of a data set on the Hub.")
    mixture: list[dict[str, Any]] | str | None = HfArg(
        default=None,
        help="Several data sets to train on: a list of {dataset, weight, data_files, caption_column, ...}; "
        "JSON or a YAML file on the command line. `dataset` then gives the held-out rows only.",
    )
    train_split: str = HfArg(default="train", help="Split to train on.")
    test_split: str | None = HfArg(default="test", help="Held-out split; empty for none.")
    image_column: str = HfArg(default="image", help="Column of images, paths or URLs.")
    video_column: str | None = HfArg(default=None, help="Column of videos; default: images are read.")
    caption_column: str = HfArg(default="caption", help="Column of captions; from a list, one is drawn.")
    max_train_samples: int | None = HfArg(default=None, help="Use only the first samples.")
    max_test_samples: int | None = HfArg(default=None, help="Use only the first held-out samples.")
    streaming: bool = HfArg(default=False, help="Read while training; needs max_steps.")
    shuffle_buffer: int = HfArg(default=1000, help="Rows of a stream that each reader holds and shuffles.")
    prompt: str = HfArg(default="", help="Prompt that stands with each image.")
    prompt_column: str | None = HfArg(
        default=None, help="Column of questions; they replace {} in the prompt, e.g. 'Question: {} Short answer:'."
    )
    messages_column: str | None = HfArg(
        default=None, help="Column of conversations in the `messages` format; default: captions and prompts are read."
    )
    crop_scale: list[float] | None = HfArg(
        default=None, help="Train on random crops with this share of the image's area, e.g. 0.5 1.0."
    )
    horizontal_flip: bool = HfArg(default=False, help="Mirror half of the training images.")
    cache_features: bool = HfArg(
        default=False, help="Run the frozen vision tower over the data once; keep its features on disk."
    )
    cached_views: int | None = HfArg(
        default=None,
        help="How many crops, flips and choices of num_frames of each training image or video to keep in the cache.",
    )
    max_pixels: int = HfArg(
        default=MAX_PIXELS, help="Largest width times height of an image or frame; larger ones are bad."
    )
    skip_bad_rows: bool = HfArg(
        default=False,
        help="Skip rows with an unreadable image or no caption, and list them; default: stop at the first one.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_train_samples", "max_test_samples"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), 1)

    @property
    def draws_views(self) -> bool:
        """Whether training draws crops, flips or frames, so that an image or a video is another one in each epoch."""
        draws_frames = self.video_column is not None and self.fps is None
        return self.crop_scale is not None or self.horizontal_flip or draws_frames

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Names of the arguments that name a column to read; that of the images or videos first."""
        text = ("messages_column",) if self.messages_column else ("caption_column",)
        prompt = ("prompt_column",) if self.prompt_column else ()
        return ("video_column" if self.video_column else "image_column", *text, *prompt)
