"""What a quantised frozen language model saves and costs on a CPU: bytes, a training step, a generated caption.

    python -m benchmarks.quantization_speed

The demo's size, a language model of SmolLM2-135M's shape with random weights, bfloat16 autocast. Each candidate is
what `from_pretrained` makes of one checkpoint, quantised as by `--text_quantization`: int8 by torchao, int4 (NF4) by
bitsandbytes. The candidates take turns; medians are printed, times relative to float32.
"""

import argparse
import tempfile
from typing import Any

import torch
from finetune_lora import quantization_config

from modeling_evlgen import EVLGenForConditionalGeneration

from .timing import take_turns
from .training_step import build, generation, parts_of_a_step

CANDIDATES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization_config": quantization_config("int8")},
    "int4": {"quantization_config": quantization_config("int4")},
}


def load_candidates() -> dict[str, EVLGenForConditionalGeneration]:
    with tempfile.TemporaryDirectory() as folder:
        build("demo", "EVLGen, front-loaded").save_pretrained(folder)
        load = EVLGenForConditionalGeneration.from_pretrained
        return {name: load(folder, **given).train() for name, given in CANDIDATES.items()}


def megabytes(model: EVLGenForConditionalGeneration) -> float:
    """Of the language model's weights as they are held, whatever they are packed in."""
    tensors = []
    for parameter in model.language_model.parameters():
        inner = getattr(parameter, "__tensor_flatten__", None)
        tensors += [getattr(parameter, name) for name in inner()[0]] if inner else [parameter]
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="Rounds over which medians are taken.")
    rounds = parser.parse_args().rounds
    models = load_candidates()
    runs = {}
    for name, model in models.items():
        runs[name, "step"] = parts_of_a_step(model)["step"]
        runs[name, "generation"] = generation(model)
    seconds = take_turns(runs, rounds, torch.device("cpu"))
    print("| language model | MB | training step | generation, 5 beams |\n|---|---|---|---|")
    for name, model in models.items():
        step, words = (seconds[name, part] / seconds["float32", part] for part in ("step", "generation"))
        print(f"| {name} | {megabytes(model):.0f} | {step:.2f} | {words:.2f} |")


if __name__ == "__main__":
    main()
