"""EVLGen: a frozen vision tower, a TomeFormer and a frozen language model, trained by the caption loss alone."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import can_return_tuple

from configuration_evlgen import EVLGenConfig

from .activation_checkpointing import checkpoint_frozen_layers
from .checkpoints import EVLGenPreTrainedModel, allow_missing_towers, zero_of_trained_parts
from .connector_layers import TimeEmbedding
from .connectors import build_connector
from .fingerprints import TRAINED_PARTS
from .generation import EVLGenGenerationMixin
from .input_checks import check_length
from .labels import mask_labels, select_positions, shift_labels
from .media_features import MediaFeaturesMixin
from .model_outputs import EVLGenCausalLMOutputWithPast, EVLGenImageOutput, EVLGenModelOutputWithPast
from .soft_prompts import Encoded, embed_ids, fill_embedded
from .temporal import TemporalContextualizer, TemporalTower
from .vllm_backend import adapt_to_vllm, check_checkpoint, is_built_by_vllm


class EVLGenModel(EVLGenPreTrainedModel, MediaFeaturesMixin):
    """Vision tower → LayerNorm, Linear → TomeFormer → Linear → language model, up to its last hidden state.

    The language model is whole, so checkpoints are those of [`EVLGenForConditionalGeneration`]. Only its head does not
    run. The TomeFormer may be another connector. Each `<image>` placeholder of the text is replaced by one token of
    the soft prompt. The towers are frozen: without gradient, and in evaluation mode even after `train()`, unless the
    user trains one of their parameters.

    Args:
        config ([`EVLGenConfig`]): The configuration.
        vision_tower, language_model (`PreTrainedModel`, *optional*): Loaded towers, instead of fresh ones.
    """

    config: EVLGenConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    # transformers lets model classes declare what they can do by names with an underscore alone.
    # Trained weights stay in float32, in which small steps of the optimizer are not lost to rounding.
    _keep_in_fp32_modules_strict = list(TRAINED_PARTS)
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_compile_fullgraph = True  # with a language model that can

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
        self.connector = build_connector(config.connector_config)
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
    def _from_config(cls, config: EVLGenConfig, **kwargs: Any) -> "EVLGenModel":
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

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        checkpoint_frozen_layers(self.language_model)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, EVLGenImageOutput] | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_budgets: torch.LongTensor | list[int] | None = None,
        video_budgets: torch.LongTensor | list[int] | None = None,
        frame_times: torch.Tensor | None = None,
        token_places: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> EVLGenModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                Token ids, with a placeholder `image_token_id` for each token of an image's soft prompt, and a
                `video_token_id` for each one of a video's.
            attention_mask (`torch.Tensor` of shape `(batch, sequence)`, *optional*): 1 for tokens, 0 for padding.
            pixel_values (`torch.Tensor` of shape `(tiles, channels, height, width)`, *optional*):
                The images, in the order of their placeholders in the batch.
            pixel_values_videos (`torch.Tensor` of shape `(videos, frames, channels, height, width)`, *optional*):
                The videos, likewise.
            frame_mask (`torch.BoolTensor` of shape `(videos, frames)`, *optional*):
                False for the frames that pad a short video.
            vision_features (`torch.Tensor` of shape `(images, num_vision_tokens, vision_hidden_size)`, *optional*):
                Features of the images from [`get_vision_features`], instead of `pixel_values`. Features of videos take
                the placeholders of images.
            inputs_embeds (`torch.Tensor` of shape `(batch, sequence, text_dim)`, *optional*):
                Embedded text, instead of `input_ids`. Beside images or videos it holds the embeddings of their
                placeholders, whose ids must lie inside the embedding.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Positions of the tokens.
            mm_encoder_outputs (`dict[str, EVLGenImageOutput]`, *optional*):
                Outputs of [`get_image_features`] under `"image"`, instead of `pixel_values`, and of
                [`get_video_features`] under `"video"`, instead of `pixel_values_videos`.
            image_grid_thw (`torch.LongTensor` of shape `(images, 3)`, *optional*):
                1, and the rows and columns of tiles of each image. By default each image is one tile.
            image_budgets, video_budgets (`torch.LongTensor` of shape `(images,)` and `(videos,)`, *optional*):
                The number of tokens of each image and video, by default `config.num_image_tokens`. The processor of a
                model with a `config.image_token_range` returns it. Without it, such a model counts the placeholders of
                each image, unless it is compiled or images follow each other without a token between them.
            frame_times (`torch.Tensor` of shape `(videos, frames)`, *optional*):
                Seconds of each frame, counted from anywhere, for `config.video_mode` "merge". By default a frame has
                one second.
            token_places (`torch.FloatTensor` of shape `(videos, num_vision_tokens, 3)`, *optional*):
                If `vision_features` are those of merged videos: seconds since the first frame, row and column of each
                token, as [`get_video_features`] returns them.
            kwargs: Arguments of the language model (`cache`, `use_cache` …).

        Raises:
            ValueError: If inputs contradict each other, placeholders and images differ in number, or the text is
                longer than the language model allows.
        """
        encoded = self._encode(
            input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            frame_mask=frame_mask,
            vision_features=vision_features,
            mm_encoder_outputs=mm_encoder_outputs,
            image_grid_thw=image_grid_thw,
            image_budgets=image_budgets,
            video_budgets=video_budgets,
            frame_times=frame_times,
            token_places=token_places,
        )
        inputs = self._prepare_inputs(input_ids, inputs_embeds, encoded, position_ids, kwargs)
        outputs = self.get_decoder()(attention_mask=attention_mask, return_dict=True, **inputs)
        return EVLGenModelOutputWithPast(**outputs, image_outputs=encoded["image"], video_outputs=encoded["video"])

    def get_decoder(self) -> nn.Module:
        """Returns the language model without its head."""
        return self.language_model.base_model

    def _prepare_inputs(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        encoded: Encoded,
        position_ids: torch.LongTensor | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """The language model's arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        has_media = any(outputs is not None for outputs in encoded.values())
        # Before the embedding: under FSDP all processes gather the weights of all parts in the same order.
        zero = zero_of_trained_parts(self) if self.training and torch.is_grad_enabled() and not has_media else None
        if inputs_embeds is None:
            inputs_embeds = embed_ids(self.get_input_embeddings(), input_ids, encoded, self.config)
        else:
            inputs_embeds = fill_embedded(self.get_input_embeddings(), inputs_embeds, encoded, self.config)
        if zero is not None:
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds)
        check_length(inputs_embeds.shape[1], kwargs.get("cache"), self.config)
        if position_ids is not None and "position_ids" in self._text_arguments:
            kwargs["position_ids"] = position_ids
        if self.training:
            kwargs.setdefault("use_cache", False)  # the frozen language model is in evaluation mode, and would cache
        return {"inputs_embeds": inputs_embeds, **kwargs}


class EVLGenForConditionalGeneration(EVLGenModel, EVLGenGenerationMixin):
    """[`EVLGenModel`] with the language model's head: generates text from images and videos, and computes the loss."""

    @property
    def base_model(self) -> EVLGenModel:
        """The same model up to its last hidden state: an [`EVLGenModel`] that shares all modules and hooks."""
        view = object.__new__(EVLGenModel)
        # accelerate may have wrapped this model's own `forward`.
        view.__dict__ = {name: value for name, value in self.__dict__.items() if name != "forward"}
        return view

    @classmethod
    def _from_config(cls, config: EVLGenConfig, **kwargs: Any) -> EVLGenModel:
        if not is_built_by_vllm(config):
            return super()._from_config(config, **kwargs)
        check_checkpoint(config)
        model = EVLGenModel._from_config(config, **kwargs)
        adapt_to_vllm(model)
        return model

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        frame_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        vision_features: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, EVLGenImageOutput] | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        image_budgets: torch.LongTensor | list[int] | None = None,
        video_budgets: torch.LongTensor | list[int] | None = None,
        frame_times: torch.Tensor | None = None,
        token_places: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> EVLGenCausalLMOutputWithPast:
        """
        Args:
            input_ids, attention_mask, pixel_values, pixel_values_videos, frame_mask, vision_features, inputs_embeds,
            position_ids, mm_encoder_outputs, image_grid_thw, image_budgets, video_budgets, frame_times, token_places:
                As in [`EVLGenModel.forward`].
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                `input_ids` where the model learns to predict them, -100 elsewhere. They are shifted inside.
                Placeholders and padding are never targets.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                The positions that logits are computed for, as in transformers' language models: the last ones, or
                indices, or a mask of shape `(batch, sequence)`. With 0 it is all positions. The loss is that of these
                positions; [`target_positions`] finds those with a target.
            kwargs:
                Arguments of the language model (`cache`, `use_cache` …), and of the loss: `num_items_in_batch`, and
                `shift_labels`, the targets of all positions, instead of `labels`.

        Raises:
            ValueError: As [`EVLGenModel.forward`] does.
        """
        num_items_in_batch, targets = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        encoded = self._encode(
            input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            frame_mask=frame_mask,
            vision_features=vision_features,
            mm_encoder_outputs=mm_encoder_outputs,
            image_grid_thw=image_grid_thw,
            image_budgets=image_budgets,
            video_budgets=video_budgets,
            frame_times=frame_times,
            token_places=token_places,
        )
        inputs = self._prepare_inputs(input_ids, inputs_embeds, encoded, position_ids, kwargs)
        keeps_all = "logits_to_keep" not in self._text_arguments
        if not keeps_all:
            inputs["logits_to_keep"] = logits_to_keep
        outputs = self.language_model(attention_mask=attention_mask, return_dict=True, **inputs)
        loss = None
        if labels is not None and targets is None:
            placeholder_ids = (self.config.image_token_id, self.config.video_token_id)
            targets = shift_labels(mask_labels(labels, placeholder_ids, attention_mask))  # (batch, sequence)
        if targets is not None:
            loss = self.loss_function(
                outputs.logits,
                labels=None,
                shift_labels=targets if keeps_all else select_positions(targets, logits_to_keep),
                vocab_size=outputs.logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        fields = {name: outputs.get(name) for name in ("logits", "cache", "hidden_states", "attentions")}
        return EVLGenCausalLMOutputWithPast(
            loss=loss, image_outputs=encoded["image"], video_outputs=encoded["video"], **fields
        )
