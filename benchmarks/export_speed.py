"""Compares the time from pixels to soft prompt in PyTorch, as a graph of torch.export, and in onnxruntime.

    python -m benchmarks.export_speed --model outputs/demo

The three take turns, with as many threads each and in float32. Medians and their ratios are printed for each batch
size. Needs `.[export]`.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from export import SoftPrompt, convert_to_onnx, example_pixels, export_graph, load_exported

from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .timing import argument_parser, markdown_table, take_turns


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, rounds=9)
    parser.add_argument("--model", default="outputs/demo", help="Captioner: a folder or a name on the Hub.")
    arguments = parser.parse_args(argv)
    prompt = SoftPrompt(EVLGenForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32))
    size = EVLGenProcessor.from_pretrained(arguments.model).image_processor.size
    image_size = size["height"], size["width"]
    program = export_graph(prompt, image_size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "soft_prompt.onnx")
        convert_to_onnx(program).save(path)
        graph, onnx_graph = program.module(), load_exported("onnx", path)

    rows = []
    for batch in (1, 8):
        pixel_values = example_pixels(prompt, image_size, batch)  # (batch, channels, height, width)
        runs = {
            "PyTorch": partial(prompt, pixel_values),
            "torch.export": partial(graph, pixel_values),
            "onnxruntime": partial(onnx_graph, pixel_values),
        }
        with torch.no_grad():
            seconds = take_turns(runs, arguments.rounds)
        rows.append([batch, *(f"{value:.4f} s, {value / seconds['PyTorch']:.2f}" for value in seconds.values())])
    print(f"{torch.get_num_threads()} threads, float32; seconds of a batch, and the ratio to PyTorch's\n")
    print(markdown_table(["images", "PyTorch", "torch.export", "onnxruntime"], rows))


if __name__ == "__main__":
    main()
