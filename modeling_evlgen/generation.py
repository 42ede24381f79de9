"""Generation from images and videos, which are encoded once."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from configuration_evlgen import EVLGenConfig

from .input_checks import check_finite
from .soft_prompts import Encoded

_VALUES = ("pixel_values", "vision_features", "token_places", "pixel_values_videos")
_LAYOUT = ("frame_mask", "image_grid_thw", "image_budgets", "video_budgets", "frame_times")


class EVLGenGenerationMixin(GenerationMixin):
    """The part of [`EVLGenForConditionalGeneration`] that generates."""

    config: EVLGenConfig
    _encode: Callable[..., Encoded]

    @torch.no_grad()
    @wraps(GenerationMixin.generate)
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Turns images and videos into soft prompts once, and generates as [`~GenerationMixin.generate`] does."""
        given = {name: kwargs.pop(name, None) for name in (*_VALUES, *_LAYOUT)}
        ids = kwargs.get("input_ids") if inputs is None else inputs
        ids = ids if kwargs.get("inputs_embeds") is None else None  # which hold the whole prompt
        outputs = self._encode(ids, **given, mm_encoder_outputs=kwargs.pop("mm_encoder_outputs", None))
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
                raise ValueError(
                    f"`{name}` is not supported: it reads the prompt's ids, and those of images are no words."
                )
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
            cache = kwargs.get("cache")
            is_first_iteration = cache is None or cache.get_seq_length() == 0
        return super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
