"""What a quantised frozen language model saves and costs on a CPU: bytes, a training step, a generated caption.

    python benchmarks/quantization.py

The demo's size, a language model of SmolLM2-135M's shape with random weights, bfloat16 autocast; its linear maps are
quantised as `--text_quantization` does it, int8 by torchao and int4 (NF4) by bitsandbytes. The candidates take turns;
medians are printed.
"""

import argparse

import torch
from bitsandbytes.nn import Linear4bit
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from connector import take_turns
from modeling_evlgen import EVLGenForConditionalGeneration
from training import build, generation, parts_of_a_step

CANDIDATES = ("float32", "bfloat16", "int8", "int4")


def prepare(candidate: str) -> EVLGenForConditionalGeneration:
    model = build("demo", "EVLGen, front-loaded")
    layers = model.language_model.model  # not the head, as transformers does it
    if candidate == "bfloat16":
        model.language_model.to(torch.bfloat16)
    elif candidate == "int8":
        quantize_(layers, Int8WeightOnlyConfig())
    elif candidate == "int4":
        for name, linear in list(layers.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                packed = Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
                packed.load_state_dict(linear.state_dict())
                layers.set_submodule(name, packed.to("cpu"))
    model.freeze_towers()
    return model


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
    models = {candidate: prepare(candidate) for candidate in CANDIDATES}
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
