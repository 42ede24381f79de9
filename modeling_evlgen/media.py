"""Images and videos become soft prompts here: the vision tower, the projection and the connector."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple, torch_compilable_check

from configuration_evlgen import EVLGenConfig

from .checkpoints import EVLGenPreTrainedModel, allow_missing_towers
from .connectors import CONNECTORS
from .soft_prompts import Encoded, EVLGenImageOutput, check_runs, connect, count_placeholders, read_grids
from .video import (
    TemporalContextualizer,
    TemporalTower,
    TimeEmbedding,
    encode_images,
    encode_videos,
    frames_of_videos,
)
from .video_merging import merge_stream, merge_videos
from .vision_tower import is_frozen


class EVLGenMediaModel(EVLGenPreTrainedModel):
    """The parts of an EVLGen model, and what they make of images and videos.

    Args:
        config ([`EVLGenConfig`]): The configuration.
        vision_tower, language_model (`PreTrainedModel`, *optional*): Loaded towers, instead of fresh ones.
    """

    def __init__(
        self,
        config: EVLGenConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        for tower in (vision_tower, language_model):
            for module in tower.modules() if tower is not None else ():
                # Or `post_init` would draw its weights anew. `no_init_weights`, which is public, is for all or none.
                module._is_hf_initialized = True
        self.vision_tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        self.language_model = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        connector_dim = config.connector_config.hidden_size
        text_dim = self.language_model.get_input_embeddings().weight.shape[1]
        self.temporal = None
        if config.temporal_contextualizer:
            sizes = config.vision_hidden_size, config.temporal_hidden_size, config.temporal_num_attention_heads
            self.temporal = TemporalTower(self.vision_tower, *sizes, config.temporal_frame_positions)
        self.ln_vision = nn.LayerNorm(config.vision_hidden_size)
        self.vision_projection = nn.Linear(config.vision_hidden_size, connector_dim)
        self.time_embedding = TimeEmbedding(connector_dim) if config.video_mode == "merge" else None
        self.connector = CONNECTORS[config.connector_config.model_type]._from_config(config.connector_config)
        self.language_projection = nn.Linear(connector_dim, text_dim)
        # Not every language model takes `logits_to_keep` and `position_ids`.
        self._text_arguments = set(inspect.signature(self.language_model.forward).parameters)
        self.post_init()
        # FSDP looks for each of these layers, and the towers' lists name some that this model does not have. There is
        # no public name for the list.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}
        self.freeze_towers()
        self.register_load_state_dict_post_hook(allow_missing_towers)
        self.tower_hashes = {}

    @classmethod
    def _from_config(cls, config: EVLGenConfig, **kwargs: Any) -> "EVLGenMediaModel":
        model = super()._from_config(config, **kwargs)
        for name in cls._keep_in_fp32_modules_strict:  # transformers does so in `from_pretrained` alone
            if getattr(model, name, None) is not None:
                getattr(model, name).float()
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TemporalContextualizer):
            init.zeros_(module.alpha)
        elif isinstance(module, TimeEmbedding):
            init.zeros_(module.weight)

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
        _check_pixels(pixel_values, frame_mask, frame_times)
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
        num_image_tokens: int | None = None,
    ) -> EVLGenImageOutput:
        """Encodes one video of any length whose frames arrive one after the other, from a camera or a long file.

        Only a few frames are in memory at a time. The result is that of all frames at once. `forward` and `generate`
        take it as `mm_encoder_outputs={"video": output}`, instead of `pixel_values_videos`.

        Args:
            frames (`Iterable`):
                Frames from the image processor, tensors of shape `(channels, height, width)`; or pairs of a frame and
                its time in seconds, as `processor.iterate_frames` yields them. Without times, a frame has one second.
            num_image_tokens (`int`, *optional*): Number of tokens of the soft prompt, as in `video_budgets`.

        Raises:
            ValueError: If there is no frame, a frame has another shape, a time is not finite, or `num_image_tokens` is
                out of range. If the model has a temporal contextualizer, in which all frames attend to each other.
            TypeError: If a frame is not a tensor, or a time not a number.
        """
        if self.temporal is not None:
            raise ValueError(
                "`encode_video` takes frames one after the other, but in a model with a `temporal_contextualizer` all "
                "frames attend to each other. Use `get_video_features`."
            )
        budgets = self._read_budgets("video", None if num_image_tokens is None else [num_image_tokens], 1)
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
        budgets = self._read_budgets("video", video_budgets, len(pixel_values_videos))
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
        budgets = self._read_budgets("image", image_budgets, len(grids))
        if len(grids) != len(vision_features):
            self.config.check_square_grid("`image_grid_thw` with several tiles")
        tokens = self._normalize(vision_features)  # (tiles, num_vision_tokens, vision_hidden_size)
        if token_places is not None:
            _check_token_places(token_places, vision_features, grids)
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
        own = self.config.connector_config.default_budget(self.config.num_vision_tokens)
        is_default = grid == (1, 1) and budget == own
        places = {} if patches is None else {"places": patches}
        connected = self.connector(tokens, grid, None if is_default else budget, **places)
        prompts = self.language_projection(connected.last_hidden_state)  # (images, budget, text_dim)
        return prompts, connected.get("output_index")

    def _normalize(self, vision_features: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """Checks vision features, and runs `ln_vision` over them in its own dtype."""
        if not torch.is_tensor(vision_features):
            raise TypeError(f"`vision_features` must be a tensor, but is a {type(vision_features).__name__}.")
        expected = (self.config.num_vision_tokens, self.config.vision_hidden_size)
        if vision_features.ndim != 3 or tuple(vision_features.shape[1:]) != expected:
            raise ValueError(
                f"`vision_features` must have shape (images, {expected[0]}, {expected[1]}), but has "
                f"{tuple(vision_features.shape)}."
            )
        return self.ln_vision(vision_features.to(device=device, dtype=self.ln_vision.weight.dtype))

    def encode(
        self,
        input_ids: torch.LongTensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        frame_times: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        token_places: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_budgets: torch.LongTensor | list[int] | None = None,
        video_budgets: torch.LongTensor | list[int] | None = None,
        mm_encoder_outputs: dict[str, EVLGenImageOutput] | None = None,
    ) -> Encoded:
        """The soft prompts of the images and of the videos, if there are any, each from the one argument given.

        The arguments and errors are those of [`EVLGenModel.forward`].
        """
        encoded: Encoded = {"image": None, "video": None, **(mm_encoder_outputs or {})}
        if sum(images is not None for images in (pixel_values, vision_features, encoded["image"])) > 1:
            raise ValueError("Only one of `pixel_values`, `vision_features` and `mm_encoder_outputs` can be given.")
        if pixel_values_videos is not None and encoded["video"] is not None:
            raise ValueError("Only one of `pixel_values_videos` and `mm_encoder_outputs` can be given.")
        for name, tensor in (("frame_mask", frame_mask), ("frame_times", frame_times)):
            if tensor is not None and pixel_values_videos is None and encoded["video"] is None:
                raise ValueError(f"`{name}` is for videos, but there are none.")
        if token_places is not None and vision_features is None:
            raise ValueError("`token_places` is for `vision_features`, but there are none.")
        images = pixel_values if vision_features is None else vision_features
        if images is not None:
            num_images = len(images) if image_grid_thw is None else len(image_grid_thw)
            budgets = self._read_budgets("image", image_budgets, num_images, input_ids)
            if vision_features is None:
                encoded["image"] = self.get_image_features(images, image_grid_thw, budgets, return_dict=True)
            else:
                encoded["image"] = self.project_vision_features(images, image_grid_thw, budgets, token_places)
        if pixel_values_videos is not None:
            budgets = self._read_budgets("video", video_budgets, len(pixel_values_videos), input_ids)
            encoded["video"] = self.get_video_features(
                pixel_values_videos, frame_mask, budgets, frame_times, return_dict=True
            )
        return encoded

    def _read_budgets(
        self,
        name: str,
        given: torch.LongTensor | list[int] | None,
        num_items: int,
        input_ids: torch.LongTensor | None = None,
    ) -> list[int]:
        """The number of tokens of each image or video; `name` is `"image"` or `"video"`.

        It is the number given. Otherwise, a model that was trained with several reads it from the placeholders. A
        compiled model does not, nor does one whose images follow each other without a token between them. There, all
        have `config.num_image_tokens`.
        """
        config = self.config
        mask = None if input_ids is None else input_ids == getattr(config, f"{name}_token_id")  # (batch, sequence)
        if given is None and config.image_token_range is not None and mask is not None:
            given = None if torch.compiler.is_compiling() else count_placeholders(mask, num_items)
        budgets = config.read_budgets(f"{name}_budgets", given, num_items)
        if mask is not None:
            check_runs(name, mask, budgets)
        return budgets


def _check_pixels(
    pixel_values: torch.Tensor, frame_mask: torch.Tensor | None, frame_times: torch.Tensor | None
) -> None:
    """
    Raises:
        ValueError: If pixels have neither the shape of images nor that of videos. If `frame_mask` or `frame_times` do
            not fit them, or a video has no frame.
        TypeError: If `frame_mask` or `frame_times` is no tensor.
    """
    shape = tuple(pixel_values.shape)
    if len(shape) not in (4, 5):
        raise ValueError(
            "`pixel_values` must have shape (images, channels, height, width) or (videos, frames, channels, height, "
            f"width), but has {shape}."
        )
    if len(shape) == 5 and 0 in shape[:2]:
        raise ValueError(f"Pixels of videos must hold at least one frame of each video, but have shape {shape}.")
    for name, tensor in (("frame_mask", frame_mask), ("frame_times", frame_times)):
        if tensor is not None and not torch.is_tensor(tensor):
            raise TypeError(f"`{name}` must be a tensor, but is a {type(tensor).__name__}.")
        if tensor is not None and len(shape) == 4:
            raise ValueError(f"`{name}` is for videos, but `pixel_values` holds images.")
        if tensor is not None and tuple(tensor.shape) != shape[:2]:
            raise ValueError(f"`{name}` must have shape {shape[:2]}, but has {tuple(tensor.shape)}.")
    if frame_mask is not None:
        has_frame = frame_mask.bool().any(dim=1)  # (videos,)
        torch_compilable_check(
            has_frame.all(),
            lambda: (
                "`frame_mask` must have a frame in each video, but has none in the videos "
                f"{(~has_frame).nonzero().flatten().tolist()}."
            ),
        )


def _check_token_places(
    token_places: torch.Tensor, vision_features: torch.Tensor, grids: list[tuple[int, int]]
) -> None:
    """
    Raises:
        ValueError: If `token_places` is no tensor of shape `(videos, num_vision_tokens, 3)`, or is not finite, or a
            grid has several tiles.
    """
    expected = (*vision_features.shape[:2], 3)
    if not torch.is_tensor(token_places) or tuple(token_places.shape) != expected:
        given = tuple(token_places.shape) if torch.is_tensor(token_places) else type(token_places).__name__
        raise ValueError(f"`token_places` must be a tensor of shape {expected}, but is {given}.")
    if len(grids) != len(vision_features):
        raise ValueError("`token_places` is for merged videos, but `image_grid_thw` has images of several tiles.")
    is_finite = token_places.isfinite().flatten(1).all(dim=1)  # (videos,)
    torch_compilable_check(
        is_finite.all(),
        lambda: (
            "`token_places` must be finite, but has NaN or infinity in the videos "
            f"{(~is_finite).nonzero().flatten().tolist()}."
        ),
    )
