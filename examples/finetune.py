"""Adapts a trained model to captions, questions or conversations: LoRA on the frozen towers beside the connector.

    python examples/finetune.py

trains the demo's captioner on easy-VQA's questions. Other recipes are for captions and conversations of your own:

    accelerate launch examples/finetune.py --config examples/configs/finetune-captions.yaml --model path/to/model \
        --dataset my_images

docs/adapt.md has questions, conversations and quantised language models. The result in `output_dir` is an adapter
with the trained connector in it, which loads like a model. `--lora none` saves a whole model.

LoRA is by Hu et al., ICLR 2022; adapters and quantised language models are by PEFT, bitsandbytes and torchao.
"""

import common.processes  # isort: skip  # first, since it sets how PyTorch's threads wait

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.hf_argparser import HfArg
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_bitsandbytes_available, is_torchao_available

from common.arguments import DataArguments, EVLGenTrainingArguments, GenerationArguments, parse_arguments
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.models import allow_token_range, load_trainable
from common.training.run import start_run, train_captioner
from configuration_evlgen import read_budgets
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.fingerprints import TRAINED_PARTS
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo-vqa.yaml"
TOWERS = {"text": ("language_model",), "vision": ("vision_tower",), "both": ("language_model", "vision_tower")}
LINEAR = (nn.Linear, Conv1D)  # the layers of quantised models are subclasses; GPT-2 has Conv1D


@dataclass
class FinetuneArguments:
    model: str = HfArg(default="outputs/demo", help="Model to train: a folder or a name on the Hub.")
    text_quantization: Literal["int8", "int4"] | None = HfArg(default=None, help="Quantise the language model.")
    image_token_range: list[int] | None = HfArg(
        default=None, help="Train for any number of tokens of an image in this range. Default: the model's range."
    )

    def __post_init__(self):
        read_budgets("num_image_tokens", [], 0, None, self.image_token_range)  # raises if it is no range


@dataclass
class LoraArguments:
    lora: Literal["none", "text", "vision", "both"] = HfArg(default="text", help="Frozen towers that get an adapter.")
    lora_r: int = HfArg(default=16, help="Rank of the adapters.")
    lora_alpha: int = HfArg(default=32, help="The adapters are scaled by lora_alpha / lora_r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout on the input of the adapters.")


ARGUMENTS = (FinetuneArguments, LoraArguments, DataArguments, GenerationArguments, EVLGenTrainingArguments)


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, lora_args, data_args, generation_args, training_args = parse_arguments(
        *ARGUMENTS, argv=argv, recipe=DEMO_RECIPE
    )
    if data_args.cache_features and lora_args.lora in ("vision", "both"):
        raise ValueError("`cache_features` is for a frozen vision tower, but `lora` adapts it.")
    if model_args.image_token_range and lora_args.lora != "none":
        raise ValueError("`image_token_range` is saved with a model, but `lora` saves an adapter alone.")
    checkpoint = start_run(training_args)

    with training_args.main_process_first(desc="preparing model and data"):
        processor = load_trainable(model_args.model, load=EVLGenProcessor.from_pretrained)
        data_args.complete_frames(processor)
        splits = load_datasets(data_args, training_args.seed)
        quantization = quantization_config(model_args.text_quantization)
        model = load_trainable(model_args.model, quantization_config=quantization)
        allow_token_range(model, processor, model_args.image_token_range)
        model.generation_config.max_new_tokens = generation_args.max_new_tokens
        model.to(training_args.device)
        splits = cache_features(model, processor, *splits, data_args, training_args.seed)
        if lora_args.lora != "none":
            model = add_lora(model, lora_args)

    shared_args = training_args, generation_args, data_args
    return train_captioner(model, processor, splits, checkpoint, *shared_args, model_args, lora_args)


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
    """Adds adapters to the towers. They are trained and saved together with everything that EVLGen trains."""
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

    On a CPU, torchao stores 4 bits as 8, and gradients through bitsandbytes 0.50's 8 bits are wrong.
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


if __name__ == "__main__":
    common.processes.run_script(main)
