"""Generation from images and videos, which are encoded once."""

from functools import wraps
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from .input_checks import check_finite

# Releases of transformers before 5.18 encode images in the first step, not before it.
_ENCODES_FIRST = hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")

_LAYOUT = ("image_grid_thw", "image_budgets", "video_budgets", "frame_times")


class EVLGenGenerationMixin(GenerationMixin):
    """The part of [`EVLGenForConditionalGeneration`] that `generate` calls."""

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        num_beams = generation_config.num_beams
        if num_beams is not None and (not isinstance(num_beams, int) or num_beams < 1):
            raise ValueError(f"`num_beams` must be a whole number, 1 or more, but is {num_beams!r}.")
        return generation_config, model_kwargs

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Turns images and videos into soft prompts once, before the first step."""
        names = ("pixel_values", "vision_features", "token_places", "pixel_values_videos", "frame_mask", *_LAYOUT)
        given = {name: model_kwargs.pop(name, None) for name in names}
        ids = model_kwargs.pop("_prompt_ids", None)
        outputs = self._encode(ids, **given, mm_encoder_outputs=model_kwargs.get("mm_encoder_outputs"))
        # Copies: with beams, transformers repeats the prompts in them, and they may be the user's.
        outputs = {name: type(output)(**output) for name, output in outputs.items() if output is not None}
        # Words from NaN look like any others. `forward` does not check this: it would make the CPU wait for the GPU in
        # every step of a training, where the loss shows it. Soft prompts alone would not do, since some towers clamp
        # infinity; inputs alone would not either, since weights may be NaN, or overflow in half precision.
        check_finite({f"`{name}`": tensor for name, tensor in given.items() if name not in ("frame_mask", *_LAYOUT)})
        check_finite({f"The {name} soft prompt": output.pooler_output for name, output in outputs.items()})
        return {**model_kwargs, "mm_encoder_outputs": outputs}

    def _get_logits_processor(self, generation_config: GenerationConfig, **kwargs: Any) -> LogitsProcessorList:
        """Never generates placeholders. A repetition penalty counts generated tokens alone, as in the original."""
        for name in ("encoder_repetition_penalty", "prompt_lookup_num_tokens"):
            if getattr(generation_config, name, None) not in (None, 1.0):
                raise ValueError(
                    f"`{name}` is not supported: it reads the prompt's ids, and those of images are no words."
                )
        processors = super()._get_logits_processor(generation_config, **kwargs)
        placeholders = [self.config.image_token_id, self.config.video_token_id]
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor):
                processor.prompt_ignore_length = kwargs.get("input_ids_seq_length") or 0
        processors.append(SuppressTokensLogitsProcessor(placeholders, device=kwargs.get("device")))
        return processors

    def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, str | None, dict[str, Any]]:
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if name == "input_ids":
            model_kwargs["_prompt_ids"] = inputs  # the budgets of images are the numbers of their placeholders
        if not _ENCODES_FIRST:
            model_kwargs = self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        return inputs, name, model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, input_ids: torch.LongTensor | None = None, **kwargs: Any
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        if not _ENCODES_FIRST and expand_size > 1 and input_ids is not None:
            outputs = kwargs["mm_encoder_outputs"]
            kwargs["mm_encoder_outputs"] = {
                name: self._expand_soft_prompts(name, output, input_ids, expand_size)
                for name, output in outputs.items()
            }
        return super()._expand_inputs_for_generation(expand_size=expand_size, input_ids=input_ids, **kwargs)

    def _expand_soft_prompts(self, modality: str, output: Any, input_ids: torch.LongTensor, expand_size: int) -> Any:
        """Repeats the soft prompts of each row, so that they follow the order of the repeated rows."""
        placeholders = input_ids == getattr(self.config, f"{modality}_token_id")  # (batch, sequence)
        rows = output.soft_tokens.split(placeholders.sum(dim=1).tolist())
        return type(output)(pooler_output=torch.cat([row for row in rows for _ in range(expand_size)]))

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers reads the names of its arguments
    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> dict:
        if not is_first_iteration and kwargs.get("next_sequence_length") != 1:
            # The draft of assisted decoding starts with the prompt, but transformers does not mark this as the first.
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            is_first_iteration = cache is None or cache.get_seq_length() == 0
        if not _ENCODES_FIRST and not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("mm_encoder_outputs", None)  # they are in the cache
        return super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
