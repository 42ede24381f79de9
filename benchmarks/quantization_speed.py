"""Measures what a quantised frozen language model saves and costs on a CPU: bytes, a training step, generation.

    python -m benchmarks.quantization_speed

The model has the demo's size and a language model of SmolLM2-135M's shape, with random weights and bfloat16 autocast.
All candidates are loaded from one checkpoint, quantised as by `--text_quantization`: int8 by torchao, int4 (NF4) by
bitsandbytes. They take turns. Medians are printed. Times are relative to float32.
"""

import tempfile
from typing import Any

import torch
from finetune_lora import quantization_config

from modeling_evlgen import EVLGenForConditionalGeneration

from .timing import argument_parser, markdown_table, take_turns
from .training_step import SIZES, build, generation, parts_of_a_step

CANDIDATES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization_config": quantization_config("int8")},
    "int4": {"quantization_config": quantization_config("int4")},
}


def load_candidates(model: EVLGenForConditionalGeneration) -> dict[str, EVLGenForConditionalGeneration]:
    """Saves a model and loads it as each candidate."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        load = EVLGenForConditionalGeneration.from_pretrained
        return {name: load(folder, **arguments).train() for name, arguments in CANDIDATES.items()}


def megabytes(model: EVLGenForConditionalGeneration) -> float:
    """Size of the language model's weights, packed as they are."""
    tensors = []
    for parameter in model.language_model.parameters():
        flatten = getattr(parameter, "__tensor_flatten__", None)  # torchao's subclasses hold several tensors
        tensors += [getattr(parameter, name) for name in flatten()[0]] if flatten else [parameter]
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def compare(model: EVLGenForConditionalGeneration, rounds: int) -> None:
    """Prints bytes and times of a model in each precision."""
    candidates = load_candidates(model)
    runs = {}
    for name, candidate in candidates.items():
        runs[name, "step"] = parts_of_a_step(candidate)["step"]
        runs[name, "generation"] = generation(candidate)
    seconds = take_turns(runs, rounds)
    rows = []
    for name, candidate in candidates.items():
        ratios = [seconds[name, part] / seconds["float32", part] for part in ("step", "generation")]
        rows.append([name, f"{megabytes(candidate):.0f}", *(f"{ratio:.2f}" for ratio in ratios)])
    print(markdown_table(["language model", "MB", "training step", "generation, 5 beams"], rows))


def main(argv: list[str] | None = None) -> None:
    arguments = argument_parser(__doc__, rounds=7).parse_args(argv)
    compare(build(SIZES["demo"]["EVLGen, front-loaded"]), arguments.rounds)


if __name__ == "__main__":
    main()
