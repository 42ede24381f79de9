"""LoRA (Hu et al., ICLR 2022) on the frozen towers, beside the connector, by PEFT; and quantised language models."""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.hf_argparser import HfArg
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import TRAINED_PARTS

TOWERS = {"text": ("language_model",), "vision": ("vision_tower",), "both": ("language_model", "vision_tower")}
LINEAR = (nn.Linear, Conv1D)  # the layers of quantised models are subclasses; GPT-2 has Conv1D


@dataclass
class LoraArguments:
    lora: Literal["none", "text", "vision", "both"] = HfArg(default="text", help="Frozen towers that get an adapter.")
    lora_r: int = HfArg(default=16, help="Rank of the adapters.")
    lora_alpha: int = HfArg(default=32, help="The adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout on the input of the adapters.")


def target_modules(model: EVLGenForConditionalGeneration, lora: str) -> list[str]:
    """Names all linear layers inside the numbered blocks of the towers. Adapters go there.

    Heads, poolers and embeddings lie outside the blocks. A mixture's experts get no adapter where transformers keeps
    them as one tensor. Raises a ValueError if a tower has no such layers.
    """
    names = []
    for tower in TOWERS[lora]:
        modules = getattr(model, tower).named_modules(prefix=tower)
        layers = [name for name, module in modules if isinstance(module, LINEAR) and re.search(r"\.\d+\.", name)]
        if not layers:
            raise ValueError(
                f"`lora` is {lora!r}, but the {tower.replace('_', ' ')} ({getattr(model, tower).config.model_type!r}) "
                "has no linear layers inside numbered blocks. An adapter needs such layers."
            )
        names += layers
    return names


def add_lora(model: EVLGenForConditionalGeneration, arguments: LoraArguments) -> PeftModel:
    """Adds adapters to the towers. They are trained and saved together with everything that EVLGen trains.

    Raises a ValueError if a tower has no layers for adapters.
    """
    if os.path.isdir(model.name_or_path):
        # The adapter names its model, and shall find it from any working directory.
        model.name_or_path = os.path.abspath(model.name_or_path)
    config = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=target_modules(model, arguments.lora),
        # Trained in full, and saved with the adapter.
        modules_to_save=[name for name in TRAINED_PARTS if getattr(model, name) is not None],
    )
    return get_peft_model(model, config)


def quantization_config(bits: Literal["int8", "int4"] | None) -> Any | None:
    """Returns how to quantise a language model: to 4 bits (NF4) or 8 bits by bitsandbytes, to 8 on a CPU by torchao.

    On a CPU, torchao stores 4 bits as 8, and gradients through bitsandbytes 0.50's 8 bits are wrong. Raises an
    ImportError if the library is not installed.
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
