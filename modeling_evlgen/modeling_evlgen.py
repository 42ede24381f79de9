"""EVLGen: a frozen vision tower, a TomeFormer and a frozen language model, trained by the caption loss alone."""

from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from transformers.utils import can_return_tuple

from configuration_evlgen import EVLGenConfig

from .fingerprints import TRAINED_PARTS
from .media import EVLGenMediaModel
from .soft_prompts import (
    Encoded,
    EVLGenCausalLMOutputWithPast,
    EVLGenImageOutput,
    EVLGenModelOutputWithPast,
    check_finite,
    embed_ids,
    fill_embedded,
)
from .texts import (
    SeparateTexts,
    build_masks,
    can_share,
    check_length,
    count_positions,
    mask_labels,
    select_positions,
    separate,
    shift_labels,
    warn_of_endless,
)
from .vision_tower import find_image_size, is_sharded
from .vllm_backend import adapt_to_vllm, check_checkpoint, is_built_by_vllm

# The keys and values of earlier tokens have another name in transformers 5.19, which vLLM 0.33 needs.
_CACHE = "cache" if "cache" in EVLGenCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

# The inputs of images and videos: those with numbers, and those that say what belongs together.
_VALUES = ("pixel_values", "vision_features", "token_places", "pixel_values_videos")
_LAYOUT = ("frame_mask", "frame_times", "image_grid_thw", "image_budgets", "video_budgets")


class EVLGenModel(EVLGenMediaModel):
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
    # transformers wants model classes to set and override names with an underscore, here and below.
    # Trained weights stay in float32, in which small steps of the optimizer are not lost to rounding.
    _keep_in_fp32_modules_strict = list(TRAINED_PARTS)
    _supports_sdpa = True
    _supports_flash_attn = True
    _can_compile_fullgraph = True  # with a language model that can

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
        segment_ids: torch.LongTensor | None = None,
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
                Features from [`get_vision_features`], instead of `pixel_values`. Those of videos take the placeholders
                of images.
            inputs_embeds (`torch.Tensor` of shape `(batch, sequence, text_dim)`, *optional*):
                Embedded text, instead of `input_ids`. Beside images or videos it holds the embeddings of their
                placeholders, whose ids must lie inside the embedding.
            position_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*): Positions of the tokens.
            segment_ids (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                For several texts behind one prefix, as the processor makes them: 0 on the prefix, n on the n-th text,
                and -1 on padding. Each text sees the prefix and itself alone, and has its position behind the prefix.
                Where the language model takes no such mask, outputs have a row for each text.
            mm_encoder_outputs (`dict[str, EVLGenImageOutput]`, *optional*):
                Outputs of [`get_image_features`] under `"image"`, instead of `pixel_values`, and of
                [`get_video_features`] under `"video"`, instead of `pixel_values_videos`.
            image_grid_thw (`torch.LongTensor` of shape `(images, 3)`, *optional*):
                1, and the rows and columns of tiles of each image. By default each image is one tile.
            image_budgets, video_budgets (`torch.LongTensor` of shape `(images,)` and `(videos,)`, *optional*):
                The number of tokens of each image and video, by default `config.num_image_tokens`. A model with a
                `config.image_token_range` counts the placeholders of each image, unless it is compiled or images
                follow each other without a token between them.
            frame_times (`torch.Tensor` of shape `(videos, frames)`, *optional*):
                Seconds of each frame, for `config.video_mode` "merge". By default a frame has one second.
            token_places (`torch.FloatTensor` of shape `(videos, num_vision_tokens, 3)`, *optional*):
                If `vision_features` are merged videos: seconds since the first frame, row and column of each token, as
                [`get_video_features`] returns them.
            kwargs: Arguments of the language model (`cache`, `use_cache` …).

        Raises:
            ValueError: If inputs contradict each other, placeholders and images differ in number, or the text is
                longer than the language model allows.
        """
        encoded = self.encode(
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
        texts = None if segment_ids is None else separate(segment_ids)
        inputs = self._prepare_inputs(
            input_ids, attention_mask, inputs_embeds, encoded, position_ids, segment_ids, texts, kwargs
        )
        outputs = self.get_decoder()(return_dict=True, **inputs)
        return EVLGenModelOutputWithPast(**outputs, image_outputs=encoded["image"], video_outputs=encoded["video"])

    def get_decoder(self) -> nn.Module:
        """Returns the language model without its head."""
        return self.language_model.base_model

    def _prepare_inputs(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        encoded: Encoded,
        position_ids: torch.LongTensor | None,
        segment_ids: torch.LongTensor | None,
        texts: SeparateTexts | None,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        """The language model's arguments. Texts that cannot share their prefix become rows."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` must be given.")
        has_media = any(outputs is not None for outputs in encoded.values())
        # Before the embedding: under FSDP all processes gather the weights of all parts in the same order.
        zero = _zero_of_trained_parts(self) if self.training and torch.is_grad_enabled() and not has_media else None
        if inputs_embeds is None:
            inputs_embeds = embed_ids(self.get_input_embeddings(), input_ids, encoded, self.config)
        else:
            inputs_embeds = fill_embedded(self.get_input_embeddings(), inputs_embeds, encoded, self.config)
        if zero is not None:
            inputs_embeds = inputs_embeds + zero.to(inputs_embeds)
        length = inputs_embeds.shape[1]
        if texts is not None:
            if position_ids is not None or segment_ids.shape != inputs_embeds.shape[:2]:
                wanted = f"shape {tuple(inputs_embeds.shape[:2])}, and no `position_ids` beside them"
                raise ValueError(f"`segment_ids` must have {wanted}, but have {tuple(segment_ids.shape)}.")
            if attention_mask is not None and not torch.equal(attention_mask.bool(), segment_ids >= 0):
                raise ValueError("`segment_ids` must be -1 where `attention_mask` is 0, and there alone, but are not.")
            length = texts.mask.shape[1]
            if can_share(self.language_model):
                position_ids = count_positions(segment_ids)
                config = self.language_model.config.get_text_config()
                attention_mask = build_masks(config, inputs_embeds, segment_ids, position_ids)
            else:
                inputs_embeds, attention_mask = texts.take(inputs_embeds), texts.mask
            kwargs["use_cache"] = False
        check_length(length, kwargs.get(_CACHE), self.config)
        if position_ids is not None and "position_ids" in self._text_arguments:
            kwargs["position_ids"] = position_ids
        if self.training:
            kwargs.setdefault("use_cache", False)  # the frozen language model is in evaluation mode, and would cache
        return {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **kwargs}


class EVLGenForConditionalGeneration(EVLGenModel, GenerationMixin):
    """[`EVLGenModel`] with the language model's head: generates text from images and videos, and computes the loss."""

    _saw_targets = False

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
        segment_ids: torch.LongTensor | None = None,
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
            labels (`torch.LongTensor` of shape `(batch, sequence)`, *optional*):
                `input_ids` where the model learns to predict them, -100 elsewhere. They are shifted inside.
                Placeholders and padding are never targets.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                The positions that logits and loss are computed for, as in transformers' language models: the last
                ones, or indices, or a mask of shape `(batch, sequence)`. With 0 it is all positions.
                [`target_positions`] finds those with a target.
            kwargs:
                Arguments of the language model (`cache`, `use_cache` …), and of the loss: `num_items_in_batch`, and
                `shift_labels`, the targets of all positions, instead of `labels`.
            others: As in [`EVLGenModel.forward`].

        Raises:
            ValueError: As [`EVLGenModel.forward`] does.
        """
        num_items_in_batch, targets = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        encoded = self.encode(
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
        texts = None if segment_ids is None else separate(segment_ids)
        if labels is not None and targets is None:
            placeholder_ids = (self.config.image_token_id, self.config.video_token_id)
            labels = mask_labels(labels, placeholder_ids, attention_mask)
            targets = shift_labels(labels) if texts is None else texts.targets(labels)  # (batch or texts, sequence)
            if self.training and not self._saw_targets and not torch.compiler.is_compiling():
                self._saw_targets = True  # once: the CPU waits for the GPU here
                warn_of_endless(targets, self.generation_config.eos_token_id)
        inputs = self._prepare_inputs(
            input_ids, attention_mask, inputs_embeds, encoded, position_ids, segment_ids, texts, kwargs
        )
        if texts is not None and not can_share(self.language_model):
            texts = None  # they are rows now
            logits_to_keep = targets != -100 if torch.is_tensor(logits_to_keep) else logits_to_keep
        if "logits_to_keep" in self._text_arguments:
            inputs["logits_to_keep"] = logits_to_keep
        else:
            logits_to_keep = 0
        outputs = self.language_model(return_dict=True, **inputs)
        loss = None
        if targets is not None:
            logits = outputs.logits
            if texts is not None:
                logits, targets = texts.pair(logits, targets, logits_to_keep)
            loss = self.loss_function(
                logits,
                labels=None,
                shift_labels=targets if texts is not None else select_positions(targets, logits_to_keep),
                vocab_size=logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
            )
        fields = {name: outputs.get(name) for name in ("logits", _CACHE, "hidden_states", "attentions")}
        return EVLGenCausalLMOutputWithPast(
            loss=loss, image_outputs=encoded["image"], video_outputs=encoded["video"], **fields
        )

    @torch.no_grad()
    @wraps(GenerationMixin.generate)
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Turns images and videos into soft prompts once, and generates as [`~GenerationMixin.generate`] does."""
        if kwargs.get("segment_ids") is not None:
            raise ValueError("`segment_ids` are for training. For generation, each question is a row of its own.")
        given = {name: kwargs.pop(name, None) for name in (*_VALUES, *_LAYOUT)}
        ids = kwargs.get("input_ids") if inputs is None else inputs
        ids = ids if kwargs.get("inputs_embeds") is None else None  # which hold the whole prompt
        outputs = self.encode(ids, **given, mm_encoder_outputs=kwargs.pop("mm_encoder_outputs", None))
        # Copies: with beams, transformers repeats the prompts in them, and they may be the user's.
        outputs = {name: type(output)(**output) for name, output in outputs.items() if output is not None}
        # Words from NaN look like any others. `forward` does not check this: it would make the CPU wait for the GPU in
        # every step of a training, where the loss shows it. Soft prompts alone would not do, since some towers clamp
        # infinity; inputs alone would not either, since weights may be NaN, or overflow in half precision.
        check_finite({f"`{name}`": given[name] for name in _VALUES})
        check_finite({f"The {name} soft prompt": output.pooler_output for name, output in outputs.items()})
        return super().generate(inputs, *args, mm_encoder_outputs=outputs, **kwargs)

    # transformers has no public hook that sees the settings of `generate` after they are merged with the defaults.
    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        num_beams = generation_config.num_beams
        if num_beams is not None and (not isinstance(num_beams, int) or num_beams < 1):
            raise ValueError(f"`num_beams` must be a whole number, 1 or more, but is {num_beams!r}.")
        for name in ("encoder_repetition_penalty", "prompt_lookup_num_tokens"):
            if getattr(generation_config, name, None) not in (None, 1.0):
                raise ValueError(f"`{name}` is not supported: it reads the prompt's ids, and images have none.")
        return generation_config, model_kwargs

    # Nor one for the processors that it makes of them.
    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        """Never generates placeholders. A repetition penalty counts generated tokens alone, as in the original."""
        processors = super()._get_logits_processor(generation_config, **kwargs)
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                processor.prompt_ignore_length = kwargs.get("input_ids_seq_length") or 0
        placeholders = [self.config.image_token_id, self.config.video_token_id]
        processors.append(SuppressTokensLogitsProcessor(placeholders, device=kwargs.get("device")))
        return processors

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers reads the names of its arguments
    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> dict:
        if not is_first_iteration and kwargs.get("next_sequence_length") != 1:
            # The draft of assisted decoding starts with the prompt, but transformers does not mark this as the first.
            cache = kwargs.get(_CACHE)
            is_first_iteration = cache is None or cache.get_seq_length() == 0
        return super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)


def _zero_of_trained_parts(model: EVLGenMediaModel) -> torch.Tensor:
    """Returns a zero whose gradient reaches all trained parts, as that of images does.

    Under DDP and FSDP, one process whose batch has no image would let the others wait for its gradients forever.
    """
    tower, config = model.vision_tower, model.config
    device = model.ln_vision.weight.device
    features = torch.zeros(1, config.num_vision_tokens, config.vision_hidden_size, device=device)
    if is_sharded(tower) or model.temporal is not None:
        channels = getattr(tower.config, "num_channels", 3)
        pixels = torch.zeros(1, channels, *find_image_size(tower.config), device=device)
        features = features + 0 * model.get_vision_features(pixels).sum().to(features)
    return 0 * model.project_vision_features(features).pooler_output.sum()
