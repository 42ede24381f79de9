"""LoRA (Hu et al., ICLR 2022) on the frozen towers, beside the connector, by PEFT; and quantised language models."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from modeling_evlgen import EVLGenForConditionalGeneration

# The linear maps of each layer, as models name them: attention first, then the feed-forward.
TEXT_TARGETS = {
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),  # Vicuna, SmolLM2 too
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "smollm3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
}
VISION_TARGETS = {
    "blip_2_vision_model": ("qkv", "projection", "fc1", "fc2"),  # EVA ViT-g
    "clip_vision_model": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "siglip_vision_model": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "dinov2": ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
    "vit": ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
}
# What is trained in full, and saved with the adapter.
TRAINED = ("ln_vision", "vision_projection", "connector", "language_projection", "temporal")


@dataclass
class LoraArguments:
    lora: Literal["none", "text", "vision", "both"] = field(
        default="text", metadata={"help": "Which frozen towers get an adapter, beside the connector."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before them."})


def target_modules(model: EVLGenForConditionalGeneration, towers: str) -> str:
    """A regular expression for the names of the linear maps that get an adapter.

    Args:
        model: The model.
        towers: `"text"`, `"vision"` or `"both"`.

    Raises:
        ValueError: If it is not known what a tower calls its linear maps.
    """
    expressions = []
    for kind, tower, config, known in (
        ("text", "language_model", model.config.text_config, TEXT_TARGETS),
        ("vision", "vision_tower", model.config.vision_config, VISION_TARGETS),
    ):
        if towers not in (kind, "both"):
            continue
        if config.model_type not in known:
            raise ValueError(
                f"`lora` knows the layers of these {kind} models: {', '.join(known)}; not of {config.model_type!r}."
            )
        # Inside a numbered layer; a head for pooling, which EVLGen does not use, has maps of the same names.
        expressions.append(rf"{tower}\.(.*\.)?\d+\.(.*\.)?({'|'.join(known[config.model_type])})")
    return "|".join(expressions)


def add_lora(model: EVLGenForConditionalGeneration, arguments: LoraArguments) -> PeftModel:
    """Puts adapters into the towers. They are trained together with the connector's side, which is saved with them.

    Raises:
        ValueError: If it is not known where they go.
    """
    if os.path.isdir(model.name_or_path):  # which the adapter will name
        model.name_or_path = os.path.abspath(model.name_or_path)
    parts = [name for name in TRAINED if getattr(model, name) is not None]
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=target_modules(model, arguments.lora),
        modules_to_save=parts,
    )
    return get_peft_model(model, config)


def quantization_config(bits: Literal["int8", "int4"] | None) -> Any | None:
    """How a language model is quantised: to 4 bits (NF4) by bitsandbytes, to 8 by that or, on a CPU, by torchao.

    On a CPU, torchao holds 4 bits in 8, and gradients through bitsandbytes' 8 bits are wrong (0.50).

    Raises:
        ImportError: If the library is not installed.
    """
    if bits is None:
        return None
    by_torchao = bits == "int8" and not torch.cuda.is_available()
    if not (is_torchao_available() if by_torchao else is_bitsandbytes_available()):
        library = "torchao" if by_torchao else "bitsandbytes"
        raise ImportError(f'`text_quantization` needs {library}. Install it with: pip install -e ".[quantization]"')
    if by_torchao:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    return BitsAndBytesConfig(load_in_8bit=bits == "int8", load_in_4bit=bits == "int4", bnb_4bit_quant_type="nf4")
