"""Images and videos become soft prompts here: the vision tower, the projection and the connector."""

import inspect
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple, torch_compilable_check

from configuration_evlgen import EVLGenConfig

from .checkpoints import EVLGenPreTrainedModel, allow_missing_towers
from .connectors import connector_class
from .soft_prompts import Encoded, EVLGenImageOutput, Grid, check_runs, count_placeholders, join_tiles, read_grids
from .video import TemporalContextualizer, TemporalTower, TimeEmbedding, encode_images, encode_videos, frames_of_videos
from .video_merging import Frames, merge_stream, merge_videos
from .vision_tower import is_frozen


class EVLGenMediaModel(EVLGenPreTrainedModel):
    """The parts of an EVLGen model, and what they make of images and videos. Arguments as in [`EVLGenModel`]."""

    def __init__(
        self,
        config: EVLGenConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        for part, tower in (("vision_config", vision_tower), ("text_config", language_model)):
            if tower is None:
                continue
            # One configuration, as in a loaded checkpoint. `generate` reads in it which attention the tower has.
            setattr(config, part, tower.config)
            for module in tower.modules():
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
        self.connector = connector_class(config.connector_config)._from_config(config.connector_config)
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
        model = super()._from_config(config, **kwargs)  # what `AutoModel.from_config` calls
        for name in cls._keep_in_fp32_modules_strict:  # transformers does so in `from_pretrained` alone
            if getattr(model, name, None) is not None:
                getattr(model, name).float()
        return model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # transformers' hook for fresh weights, as in each of its models
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
            frame_mask, frame_times (*optional*): As in [`EVLGenModel.forward`].

        Returns:
            `torch.Tensor` of shape `(images or videos, num_vision_tokens, vision_hidden_size)`. A video is the mean of
            its frames, or its merged frames by `config.video_mode`, whose places [`get_video_features`] gives, too.
            With a temporal contextualizer, an image is a video of one frame.
        """
        return self._run_tower(pixel_values, frame_mask, frame_times)[0]

    def _run_tower(
        self,
        pixel_values: torch.Tensor,
        frame_mask: torch.Tensor | None = None,
        frame_times: torch.Tensor | None = None,
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

    def encode_video(self, frames: Frames, num_image_tokens: int | None = None) -> EVLGenImageOutput:
        """Encodes one video of any length whose frames arrive one after the other, from a camera or a long file.

        Only a few frames are in memory at a time. The result is that of all frames at once. `forward` and `generate`
        take it as `mm_encoder_outputs={"video": output}`, instead of `pixel_values_videos`.

        Args:
            frames (`Iterable`):
                Frames from the image processor, tensors of shape `(channels, height, width)`; or pairs of a frame and
                its time in seconds, as `processor.iterate_frames` yields them. Without times, each has one second.
            num_image_tokens (`int`, *optional*): Number of tokens of the soft prompt, as in `video_budgets`.

        Raises:
            ValueError: If there is no frame, a frame has another shape, a time is not finite, or `num_image_tokens` is
                out of range. If the model has a temporal contextualizer, in which all frames attend to each other.
            TypeError: If a frame is not a tensor, a time not a number, or if only some of the frames have times.
        """
        if self.temporal is not None:
            reason = "in a model with a `temporal_contextualizer` all frames attend to each other"
            raise ValueError(f"`encode_video` takes one frame after another, but {reason}. Use `get_video_features`.")
        budgets = self.config.read_budgets("num_image_tokens", num_image_tokens, 1)
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
            pixel_values, image_grid_thw, image_budgets: As in [`EVLGenModel.forward`].
            kwargs: `output_hidden_states` and `output_attentions`, of the vision tower.
        """
        features, _ = self._run_tower(pixel_values)
        output = self.project_vision_features(features, image_grid_thw, image_budgets)
        return self._add_tower_states(output, pixel_values, None, kwargs)

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
            pixel_values_videos, frame_mask, video_budgets, frame_times: As in [`EVLGenModel.forward`].
            kwargs: As in [`get_image_features`].
        """
        names = ("videos", "frames", "channels", "height", "width")
        _check_tensor("pixel_values_videos", pixel_values_videos, names)
        budgets = self._read_budgets("video", video_budgets, len(pixel_values_videos))
        features, places = self._run_tower(pixel_values_videos, frame_mask, frame_times)
        output = self.project_vision_features(features, None, budgets, places)
        return self._add_tower_states(output, pixel_values_videos, frame_mask, kwargs)

    def _add_tower_states(
        self, output: EVLGenImageOutput, frames: torch.Tensor, frame_mask: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> EVLGenImageOutput:
        """Adds hidden states and attentions of the tower, if requested, of images or `(videos, frames, …)`."""
        frames = frames.unsqueeze(1) if frames.ndim == 4 else frames
        names = ("output_hidden_states", "output_attentions")
        requested = {name: kwargs.get(name, getattr(self.config.vision_config, name, None)) for name in names}
        if any(requested.values()):  # rare, and so worth another pass
            with torch.no_grad(), frames_of_videos(frames.shape[1], frame_mask):
                states = self.vision_tower(frames.flatten(0, 1).to(self.vision_tower.dtype), **requested)
            output.hidden_states, output.attentions = states.get("hidden_states"), states.get("attentions")
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
            image_grid_thw, image_budgets, token_places (*optional*): As in [`EVLGenModel.forward`].

        Raises:
            TypeError: If `vision_features` or `token_places` is no tensor.
            ValueError: If one has another shape, or grids or budgets do not fit, or `token_places` are for tiles.
        """
        grids = read_grids(image_grid_thw, len(vision_features))
        budgets = self._read_budgets("image", image_budgets, len(grids))
        if len(grids) != len(vision_features):
            self.config.check_square_grid("`image_grid_thw` with several tiles")
        tokens = self._normalize(vision_features)  # (tiles, num_vision_tokens, vision_hidden_size)
        if token_places is not None:
            _check_tensor("token_places", token_places, (*vision_features.shape[:2], 3))
            if len(grids) != len(vision_features):
                raise ValueError("`token_places` is for merged videos, but `image_grid_thw` has several tiles.")
            is_finite = token_places.isfinite().flatten(1).all(dim=1)  # (videos,)
            _check_videos(is_finite, "`token_places` must be finite, but has NaN or infinity")
        tokens = self.vision_projection(tokens)  # (tiles, num_vision_tokens, connector_dim)
        if self.time_embedding is not None:  # zero for images, so that under DDP each batch has its gradient
            times = tokens.new_zeros(1, 1) if token_places is None else token_places[..., 0]
            tokens = tokens + self.time_embedding(times)
        class_token = self.config.connector_config.class_token
        patches = None if token_places is None else token_places[:, int(class_token) :, 1:]
        prompts, output_index = self._connect_groups(tokens, grids, budgets, patches)
        return EVLGenImageOutput(
            last_hidden_state=vision_features,
            pooler_output=prompts,
            output_index=output_index,
            token_places=token_places,
        )

    def _connect_groups(
        self, tokens: torch.Tensor, grids: list[Grid], budgets: list[int], places: torch.Tensor | None
    ) -> tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor | tuple[torch.Tensor, ...] | None]:
        """Runs the connector over the tiles of images, those with the same grid and budget together.

        Returns the soft prompts and the output indices, in tuples where the images of a batch differ.
        """
        groups: dict[tuple[Grid, int], list[int]] = defaultdict(list)
        for image, key in enumerate(zip(grids, budgets, strict=True)):
            groups[key].append(image)
        tiles = tokens.split([math.prod(grid) for grid in grids])
        results: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        for (grid, budget), images in groups.items():
            grouped = torch.cat([tiles[image] for image in images]) if len(groups) > 1 else tokens
            grouped = grouped.view(len(images), math.prod(grid), *tokens.shape[1:])  # (images, tiles, tokens, dim)
            joined = join_tiles(grouped, grid, self.config.connector_config.class_token)
            prompts, index = self._connect(joined, grid, budget, None if places is None else places[images])
            if len(groups) == 1:
                return prompts, index
            indices = [None] * len(images) if index is None else index
            results |= zip(images, zip(prompts, indices, strict=True), strict=True)
        prompts, indices = zip(*(results[image] for image in range(len(grids))), strict=True)
        return torch.stack(prompts) if len(set(budgets)) == 1 else prompts, None if indices[0] is None else indices

    def _connect(
        self, tokens: torch.Tensor, grid: Grid, budget: int, places: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the connector over images of one grid, `(images, tokens, connector_dim)`."""
        own = self.config.connector_config.default_budget(self.config.num_vision_tokens)
        is_default = grid == (1, 1) and budget == own
        connected = self.connector(tokens, grid, None if is_default else budget, places=places)
        prompts = self.language_projection(connected.last_hidden_state)  # (images, budget, text_dim)
        return prompts, connected.get("output_index")

    def _normalize(self, vision_features: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """Checks vision features, and runs `ln_vision` over them in its own dtype."""
        shape = ("images", self.config.num_vision_tokens, self.config.vision_hidden_size)
        _check_tensor("vision_features", vision_features, shape)
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
        """The soft prompts of images and videos, if any. Arguments and errors are those of [`EVLGenModel.forward`]."""
        encoded: Encoded = {"image": None, "video": None, **(mm_encoder_outputs or {})}
        if len(encoded) > 2:
            raise ValueError(f'`mm_encoder_outputs` must have "image" and "video" alone, but has {[*encoded][2:]}.')
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
        """The number of tokens of each image or video (`name`), given or counted as [`EVLGenModel.forward`] says."""
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
    """Raises a ValueError if pixels are neither images nor videos with frames, or the others do not fit them."""
    shape = tuple(pixel_values.shape)
    if len(shape) not in (4, 5):
        wanted = "(images, channels, height, width) or (videos, frames, channels, height, width)"
        raise ValueError(f"`pixel_values` must have shape {wanted}, but has {shape}.")
    if len(shape) == 5 and 0 in shape[:2]:
        raise ValueError(f"Pixels of videos must hold at least one frame of each video, but have shape {shape}.")
    for name, tensor in (("frame_mask", frame_mask), ("frame_times", frame_times)):
        if tensor is not None and len(shape) == 4:
            raise ValueError(f"`{name}` is for videos, but `pixel_values` holds images.")
        if tensor is not None:
            _check_tensor(name, tensor, shape[:2])
    if frame_times is not None and (frame_times.dtype == torch.bool or frame_times.is_complex()):
        raise TypeError(f"`frame_times` must be numbers of seconds, but is {frame_times.dtype}.")
    if frame_mask is not None:
        _check_videos(frame_mask.bool().any(dim=1), "`frame_mask` must have a frame in each video, but has none")


def _check_tensor(name: str, tensor: Any, shape: Sequence[int | str]) -> None:
    """Raises a TypeError or a ValueError if an argument is no tensor of this shape. A word stands for any number."""
    if not torch.is_tensor(tensor):
        raise TypeError(f"`{name}` must be a tensor, but is a {type(tensor).__name__}.")
    sizes = [wanted if isinstance(wanted, str) else size for wanted, size in zip(shape, tensor.shape, strict=False)]
    if tensor.ndim != len(shape) or sizes != list(shape):
        wanted = ", ".join(str(size) for size in shape)
        raise ValueError(f"`{name}` must have shape ({wanted}), but has {tuple(tensor.shape)}.")


def _check_videos(is_valid: torch.Tensor, message: str) -> None:
    """Raises a ValueError with a message that ends with the numbers of the videos that are not valid."""
    torch_compilable_check(
        is_valid.all(), lambda: f"{message} in the videos {(~is_valid).nonzero().flatten().tolist()}."
    )
