"""Turns images and videos into soft prompts: the vision tower, the projection and the connector."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers.utils import can_return_tuple

from .input_checks import check_pixels, check_token_places, check_vision_features
from .model_outputs import EVLGenImageOutput
from .soft_prompts import Encoded, check_runs
from .temporal import encode_images, encode_videos, frames_of_videos
from .tiles import connect, read_budgets, read_grids
from .video_merging import merge_stream, merge_videos
from .vision_tower import is_frozen


class MediaFeaturesMixin:
    """The part of [`EVLGenModel`] that encodes images and videos."""

    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        frame_mask: torch.Tensor | None = None,
        frame_times: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the vision tower alone. Features of images can be stored, and passed as `vision_features` later.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`):
                Images from the processor; or videos, of shape `(videos, frames, channels, height, width)`.
            frame_mask (`torch.BoolTensor` of shape `(videos, frames)`, *optional*):
                False for the frames that pad a short video.
            frame_times (`torch.Tensor` of shape `(videos, frames)`, *optional*): As in [`forward`].

        Returns:
            `torch.Tensor` of shape `(images or videos, num_vision_tokens, vision_hidden_size)`. A video is the mean of
            its frames, or its merged frames by `config.video_mode`. Merged frames need the places of their tokens,
            too; only [`get_video_features`] gives both. With a temporal contextualizer, an image is a video of one
            frame.
        """
        return self._run_tower(pixel_values, frame_mask, frame_times)[0]

    def _run_tower(
        self, pixel_values: torch.Tensor, frame_mask: torch.Tensor | None, frame_times: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The features of images or videos; and the places of their tokens, if they are merged videos."""
        check_pixels(pixel_values, frame_mask, frame_times)
        pixel_values = pixel_values.to(self.vision_tower.dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains_vision()):
            if pixel_values.ndim == 4:
                return encode_images(self.vision_tower, self.temporal, pixel_values), None
            if self.config.video_mode == "mean":
                return encode_videos(self.vision_tower, self.temporal, pixel_values, frame_mask), None
            class_token = self.config.connector_config.class_token
            merged = merge_videos(self.vision_tower, pixel_values, frame_mask, frame_times, class_token)
            return merged.features, merged.places

    def _trains_vision(self) -> bool:
        return not is_frozen(self.vision_tower) or not (self.temporal is None or is_frozen(self.temporal))

    def encode_video(
        self,
        frames: Iterable[torch.Tensor | tuple[torch.Tensor, float]],
        num_tokens: int | None = None,
    ) -> EVLGenImageOutput:
        """Encodes one video of any length whose frames arrive one after the other, from a camera or a long file.

        Only a few frames are in memory at a time. The result is that of all frames at once. `forward` and `generate`
        take it as `mm_encoder_outputs={"video": output}`, instead of `pixel_values_videos`.

        Args:
            frames (`Iterable`):
                Frames from the image processor, tensors of shape `(channels, height, width)`; or pairs of a frame and
                its time in seconds, as `processor.iterate_frames` yields them. Without times, a frame has one second.
            num_tokens (`int`, *optional*): Number of tokens of the soft prompt, as `video_budgets`.

        Raises:
            ValueError: If there is no frame, a frame has another shape, a time is not finite, or `num_tokens` is out
                of range. If the model has a temporal contextualizer, in which all frames attend to each other.
            TypeError: If a frame is not a tensor, or a time not a number.
        """
        if self.temporal is not None:
            raise ValueError(
                "`encode_video` takes frames one after the other, but in a model with a `temporal_contextualizer` all "
                "frames attend to each other. Use `get_video_features`."
            )
        budgets = read_budgets("video", None if num_tokens is None else [num_tokens], 1, None, self.config)
        class_token = self.config.connector_config.class_token if self.config.video_mode == "merge" else None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._trains_vision()):
            features, places = merge_stream(self.vision_tower, frames, class_token)
        return self.project_vision_features(features, None, budgets, places)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.LongTensor | None = None,
        image_budgets: torch.LongTensor | list[int] | None = None,
        **kwargs: Any,
    ) -> EVLGenImageOutput:
        """Turns images into soft prompts.

        Args:
            pixel_values (`torch.Tensor` of shape `(tiles, channels, height, width)`): Images from the processor.
            image_grid_thw, image_budgets (*optional*): As in [`project_vision_features`].
            kwargs: `output_hidden_states` and `output_attentions`, of the vision tower.
        """
        return self._encode_pixels(pixel_values, None, None, image_grid_thw, image_budgets, kwargs)

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        frame_mask: torch.Tensor | None = None,
        video_budgets: torch.LongTensor | list[int] | None = None,
        frame_times: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> EVLGenImageOutput:
        """Turns videos into soft prompts, each of as many tokens as an image's.

        Args:
            pixel_values_videos (`torch.Tensor` of shape `(videos, frames, channels, height, width)`):
                Videos from the processor.
            frame_mask (`torch.BoolTensor` of shape `(videos, frames)`, *optional*):
                False for the frames that pad a short video.
            video_budgets (`torch.LongTensor` of shape `(videos,)` or `list[int]`, *optional*):
                The number of tokens of each video.
            frame_times (`torch.Tensor` of shape `(videos, frames)`, *optional*): As in [`forward`].
            kwargs: As in [`get_image_features`].
        """
        if pixel_values_videos.ndim != 5:
            raise ValueError(
                "`pixel_values_videos` must have shape (videos, frames, channels, height, width), but has "
                f"{tuple(pixel_values_videos.shape)}."
            )
        budgets = read_budgets("video", video_budgets, len(pixel_values_videos), None, self.config)
        return self._encode_pixels(pixel_values_videos, frame_mask, frame_times, None, budgets, kwargs)

    def _encode_pixels(
        self,
        pixel_values: torch.Tensor,
        frame_mask: torch.Tensor | None,
        frame_times: torch.Tensor | None,
        grid: torch.LongTensor | None,
        budgets: torch.LongTensor | list[int] | None,
        kwargs: dict[str, Any],
    ) -> EVLGenImageOutput:
        features, places = self._run_tower(pixel_values, frame_mask, frame_times)
        output = self.project_vision_features(features, grid, budgets, places)
        names = ("output_hidden_states", "output_attentions")
        requested = {name: kwargs.get(name, getattr(self.config.vision_config, name, None)) for name in names}
        if any(requested.values()):  # rare, and so worth another pass
            frames = pixel_values.unsqueeze(1) if pixel_values.ndim == 4 else pixel_values  # (videos, frames, …)
            pixel_values = frames.flatten(0, 1).to(self.vision_tower.dtype)
            with torch.no_grad(), frames_of_videos(frames.shape[1], frame_mask):
                tower_output = self.vision_tower(pixel_values, **requested)
            output.hidden_states = tower_output.get("hidden_states")
            output.attentions = tower_output.get("attentions")
        return output

    def project_vision_features(
        self,
        vision_features: torch.Tensor,
        image_grid_thw: torch.LongTensor | None = None,
        image_budgets: torch.LongTensor | list[int] | None = None,
        token_places: torch.Tensor | None = None,
    ) -> EVLGenImageOutput:
        """Turns the vision tower's tokens into soft prompts: the part of the model that is trained.

        Args:
            vision_features (`torch.Tensor` of shape `(tiles, num_vision_tokens, vision_hidden_size)`):
                Features from [`get_vision_features`].
            image_grid_thw (`torch.LongTensor` of shape `(images, 3)`, *optional*):
                1, and the rows and columns of tiles of each image. By default each image is one tile.
            image_budgets (`torch.LongTensor` of shape `(images,)` or `list[int]`, *optional*):
                The number of tokens of each image, by default `config.num_image_tokens`.
            token_places (`torch.FloatTensor` of shape `(videos, num_vision_tokens, 3)`, *optional*):
                For merged videos: seconds, row and column of each token. By default the tokens are those of an image.

        Raises:
            ValueError: If `vision_features` or `token_places` has another shape, or grids or budgets do not fit. If
                `token_places` are given for images of several tiles.
        """
        grids = read_grids(image_grid_thw, len(vision_features))
        budgets = read_budgets("image", image_budgets, len(grids), None, self.config)
        if len(grids) != len(vision_features):
            self.config.check_square_grid("`image_grid_thw` with several tiles")
        tokens = self._normalize(vision_features)  # (tiles, num_vision_tokens, vision_hidden_size)
        if token_places is not None:
            check_token_places(token_places, vision_features, grids)
        tokens = self.vision_projection(tokens)  # (tiles, num_vision_tokens, connector_dim)
        if self.time_embedding is not None:  # zero for images, so that under DDP each batch has its gradient
            times = tokens.new_zeros(1, 1) if token_places is None else token_places[..., 0]
            tokens = tokens + self.time_embedding(times)
        class_token = self.config.connector_config.class_token
        patches = None if token_places is None else token_places[:, int(class_token) :, 1:]
        prompts, output_index = connect(tokens, grids, budgets, class_token, self._connect, patches)
        return EVLGenImageOutput(
            last_hidden_state=vision_features,
            pooler_output=prompts,
            output_index=output_index,
            token_places=token_places,
        )

    def _connect(
        self, tokens: torch.Tensor, grid: tuple[int, int], budget: int, patches: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the connector over images of one grid, `(images, tokens, connector_dim)`."""
        own = self.config.connector_config.num_output_tokens(self.config.num_vision_tokens)
        is_default = grid == (1, 1) and budget == own
        places = {} if patches is None else {"places": patches}
        connected = self.connector(tokens, grid, None if is_default else budget, **places)
        prompts = self.language_projection(connected.last_hidden_state)  # (images, budget, text_dim)
        return prompts, connected.get("output_index")

    def _normalize(self, vision_features: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """Checks vision features, and runs `ln_vision` over them in its own dtype."""
        check_vision_features(vision_features, self.config)
        return self.ln_vision(vision_features.to(device=device, dtype=self.ln_vision.weight.dtype))

    def _encode(
        self,
        input_ids: torch.LongTensor | None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, EVLGenImageOutput] | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_budgets: torch.LongTensor | list[int] | None = None,
        video_budgets: torch.LongTensor | list[int] | None = None,
        frame_times: torch.Tensor | None = None,
        token_places: torch.Tensor | None = None,
    ) -> Encoded:
        """The soft prompts of the images and of the videos, if there are any, each from the one argument given."""
        image, video = (mm_encoder_outputs or {}).get("image"), (mm_encoder_outputs or {}).get("video")
        if sum(images is not None for images in (pixel_values, vision_features, image)) > 1:
            raise ValueError("Only one of `pixel_values`, `vision_features` and `mm_encoder_outputs` can be given.")
        if pixel_values_videos is not None and video is not None:
            raise ValueError("Only one of `pixel_values_videos` and `mm_encoder_outputs` can be given.")
        for name, tensor in (("frame_mask", frame_mask), ("frame_times", frame_times)):
            if tensor is not None and pixel_values_videos is None and video is None:
                raise ValueError(f"`{name}` is for videos, but there are none.")
        if token_places is not None and vision_features is None:
            raise ValueError("`token_places` is for `vision_features`, but there are none.")
        images, config = pixel_values if vision_features is None else vision_features, self.config
        if images is not None:
            mask = None if input_ids is None else input_ids == config.image_token_id
            num_images = len(images) if image_grid_thw is None else len(image_grid_thw)
            budgets = read_budgets("image", image_budgets, num_images, mask, config)
            check_runs("image", mask, budgets)
            tiles = {"image_grid_thw": image_grid_thw, "image_budgets": budgets}
            if vision_features is None:
                image = self.get_image_features(pixel_values, **tiles, return_dict=True)
            else:
                image = self.project_vision_features(vision_features, **tiles, token_places=token_places)
        if pixel_values_videos is not None:
            mask = None if input_ids is None else input_ids == config.video_token_id
            budgets = read_budgets("video", video_budgets, len(pixel_values_videos), mask, config)
            check_runs("video", mask, budgets)
            video = self.get_video_features(pixel_values_videos, frame_mask, budgets, frame_times, return_dict=True)
        return {"image": image, "video": video}
