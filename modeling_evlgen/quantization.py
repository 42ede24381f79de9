"""Quantises the language model alone, and leaves the vision tower and what is trained as they are."""

import copy
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig


def quantize_only_language_model(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Changes arguments of `from_pretrained` so that their `quantization_config` skips all but the language model."""
    if kwargs.get("quantization_config") is None:
        return kwargs
    quantization_config = copy.deepcopy(kwargs["quantization_config"])
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    skipped = ["vision_tower", "ln_vision", "vision_projection", "connector", "language_projection", "temporal"]
    skipped += ["time_embedding", "language_model.lm_head"]  # transformers skips it as well, unless it is given a list
    # bitsandbytes has its own name for what most of transformers' configurations call `modules_to_not_convert`.
    has_own_name = hasattr(quantization_config, "llm_int8_skip_modules")
    name = "llm_int8_skip_modules" if has_own_name else "modules_to_not_convert"
    setattr(quantization_config, name, skipped + (getattr(quantization_config, name, None) or []))
    return {**kwargs, "quantization_config": quantization_config}


def hand_over_quantizer(model: PreTrainedModel) -> None:
    """Marks the language model as quantised, instead of the whole model, which a Trainer would refuse to train."""
    if getattr(model, "hf_quantizer", None) is None:
        return
    model.language_model.hf_quantizer = model.hf_quantizer
    model.language_model.is_quantized = True
    model.is_quantized = False
    del model.hf_quantizer, model.config.quantization_config
