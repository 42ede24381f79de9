"""Measures a convolutional vision tower on a CPU with its pixels in two memory formats, and compiled.

    OMP_NUM_THREADS=1 python -m benchmarks.cnn_tower

The tower is the demo's, an EfficientNet-Lite0 with random weights. It encodes 16 images of 224 pixels in float32. The
candidates take turns. Medians are printed, with the largest difference of their tokens in relation to the largest
token. `NCHW` calls the tower without EVLGen's code. `compiled` is `torch.compile` with constants folded into the
weights (`freezing`). It compiles once for each batch size and needs a C++ compiler.
"""

import copy

import torch
from transformers import AutoModel

from modeling_evlgen.vision_tower import extract_vision_tokens

from .timing import argument_parser, markdown_table, take_turns
from .training_step import LITE0

SHAPE = (16, 3, 224, 224)  # images, channels, height and width


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    rounds = argument_parser(__doc__, rounds=9).parse_args(argv).rounds
    torch.manual_seed(0)
    tower = AutoModel.from_config(LITE0).eval().requires_grad_(False)
    pixel_values = torch.randn(SHAPE)
    channels_last = copy.deepcopy(tower).to(memory_format=torch.channels_last)
    compiled = torch.compile(extract_vision_tokens, options={"freezing": True})

    def without_conversion() -> torch.Tensor:
        (feature_map,) = tower(pixel_values=pixel_values).last_hidden_state  # (images, dim, height, width)
        return feature_map.flatten(2).transpose(1, 2)  # (images, tokens, dim)

    runs = {
        "NCHW": without_conversion,
        "pixels channels-last": lambda: extract_vision_tokens(tower, pixel_values),
        "pixels and weights channels-last": lambda: extract_vision_tokens(channels_last, pixel_values),
        "pixels channels-last, compiled": lambda: compiled(tower, pixel_values),
    }
    expected = runs["NCHW"]()
    seconds = take_turns(runs, rounds)
    rows = []
    for name, run in runs.items():
        difference = (run() - expected).abs().max() / expected.abs().max()
        rows.append([name, f"{seconds[name]:.3f} s", f"{seconds['NCHW'] / seconds[name]:.2f}", f"{difference:.1e}"])
    print(f"{torch.get_num_threads()} threads, {SHAPE[0]} images\n")
    print(markdown_table(["EfficientNet-Lite0", "time", "speed", "difference"], rows))


if __name__ == "__main__":
    main()
