"""What does exporting bring? Pixels to soft prompt in PyTorch, as a graph of torch.export, and in onnxruntime.

    python -m benchmarks.export_speed --model outputs/demo

The three take turns, round by round, so that a busy machine slows all of them alike; medians and their ratios are
printed, for a batch of each size. All have as many threads, and float32. Needs `.[export]`.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from export_graph import PIXELS, SoftPrompt, convert_to_onnx, example_pixels, export_graph

from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .timing import take_turns


def start_onnxruntime(program: torch.export.ExportedProgram) -> onnxruntime.InferenceSession:
    """With as many threads as PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "soft_prompt.onnx"
        convert_to_onnx(program).save(path)
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def runs_of(
    prompt: SoftPrompt,
    graph: torch.nn.Module,
    session: onnxruntime.InferenceSession,
    pixel_values: torch.Tensor,
) -> dict[str, Callable[[], None]]:
    def eager() -> None:
        with torch.no_grad():
            prompt(pixel_values)

    def exported() -> None:
        with torch.no_grad():
            graph(pixel_values)

    def onnx() -> None:
        session.run(None, {PIXELS: pixel_values.numpy()})

    return {"PyTorch": eager, "torch.export": exported, "onnxruntime": onnx}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo", help="Captioner: a folder or a name on the Hub.")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="Images at a time.")
    parser.add_argument("--rounds", type=int, default=9, help="Rounds over which the median is taken.")
    arguments = parser.parse_args()
    prompt = SoftPrompt(EVLGenForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32))
    size = EVLGenProcessor.from_pretrained(arguments.model).image_processor.size
    image_size = size["height"], size["width"]
    program = export_graph(prompt, image_size)
    graph, session = program.module(), start_onnxruntime(program)

    print(f"{torch.get_num_threads()} threads, float32, seconds for each batch and ratio to PyTorch")
    print(f"{'images':10}{'PyTorch':>18}{'torch.export':>18}{'onnxruntime':>18}")
    for batch in arguments.batches:
        runs = runs_of(prompt, graph, session, example_pixels(prompt, image_size, batch))
        seconds = take_turns(runs, arguments.rounds, torch.device("cpu"))
        cells = [f"{value:10.4f}{value / seconds['PyTorch']:8.2f}" for value in seconds.values()]
        print(f"{batch:<10}{''.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
