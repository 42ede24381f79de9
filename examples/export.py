"""Exports what turns pixels into a soft prompt, vision tower and connector, as one file that needs no code.

    python examples/export.py --model outputs/demo --output_dir outputs/export --formats pt2 onnx --check true

`soft_prompt.pt2` is a graph of torch.export, for any number of images, in the weights' dtype, on the CPU
(`torch.export.passes.move_to_device_pass` moves it); its settings for images lie in it:

    files = {"image_processor.json": ""}
    program = torch.export.load("outputs/export/soft_prompt.pt2", extra_files=files).module()
    soft_prompt = program(pixel_values)  # (images, num_image_tokens, text_hidden_size)

`soft_prompt.onnx` (needs `.[export]`) is the same for onnxruntime, with weights beside it where they are over 2 GB,
and the settings among its metadata. A language model takes a soft prompt in place of its placeholders' embeddings;
EVLGen's `generate` takes it as `mm_encoder_outputs={"image": EVLGenImageOutput(pooler_output=soft_prompt)}`.

`--check true` compares both with the model on 8 images, in batches of 1, 3 and 4. The graph of torch.export must
give the same up to 1e-5 of a soft prompt's largest value. onnxruntime adds up in another order, so it may be up to
1e-3 off, and one image of the 8 by more: where two links between tokens are equally strong up to the last digits,
it may merge the other one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from export_graph import (
    PIXELS,
    SoftPrompt,
    convert_to_onnx,
    example_pixels,
    export_graph,
    relative_difference,
)

from common.command_line import parse_arguments
from common.models import load_captioner
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

SETTINGS = "image_processor.json"
BATCHES = (1, 3, 4)
# Largest difference over a soft prompt's largest value, and how many images may be off by more.
TOLERANCES = {"pt2": (1e-5, 0), "onnx": (1e-3, 1)}


@dataclass
class ExportArguments:
    model: str = field(default="outputs/demo", metadata={"help": "Captioner: a folder or a name on the Hub."})
    output_dir: str = field(default="outputs/export", metadata={"help": "Where the files go."})
    formats: list[str] = field(default_factory=lambda: ["pt2"], metadata={"help": "pt2, onnx or both."})
    dtype: str = field(default="float32", metadata={"help": "Of the vision tower: float32, or bfloat16 for pt2."})
    check: bool = field(default=False, metadata={"help": "Compare what the files give with what the model gives."})


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_arguments(ExportArguments, argv=argv)
    check_arguments(arguments)
    load = EVLGenForConditionalGeneration.from_pretrained
    model = load_captioner("model", load, arguments.model, dtype=getattr(torch, arguments.dtype))
    image_processor = EVLGenProcessor.from_pretrained(arguments.model).image_processor
    prompt = SoftPrompt(model)
    image_size = image_processor.size["height"], image_processor.size["width"]
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    program = export_graph(prompt, image_size)
    files = {name: folder / f"soft_prompt.{name}" for name in arguments.formats}
    if "pt2" in files:
        torch.export.save(program, files["pt2"], extra_files={SETTINGS: image_processor.to_json_string()})
    if "onnx" in files:
        onnx_program = convert_to_onnx(program)
        onnx_program.model.metadata_props[SETTINGS] = image_processor.to_json_string()
        onnx_program.save(files["onnx"])
    for name, path in files.items():
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        if arguments.check:
            compare(prompt, image_size, name, path)


def check_arguments(arguments: ExportArguments) -> None:
    """
    Raises:
        ValueError: If there is no such format or dtype, or onnxruntime would not run it.
    """
    unknown = sorted(set(arguments.formats) - set(TOLERANCES))
    if unknown or not arguments.formats:
        raise ValueError(f"`formats` must be some of {', '.join(TOLERANCES)}, but is {arguments.formats}.")
    dtypes = ["float32"] if "onnx" in arguments.formats else ["float32", "bfloat16"]
    if arguments.dtype not in dtypes:
        raise ValueError(
            f"`dtype` must be {' or '.join(dtypes)} with `formats` {' '.join(arguments.formats)}, but is "
            f"{arguments.dtype!r}."
        )


@torch.no_grad()
def compare(prompt: SoftPrompt, image_size: tuple[int, int], name: str, path: Path) -> None:
    """Compares a file with the model that it was made of.

    Raises:
        RuntimeError: If it gives something else.
    """
    run = load_exported(name, path)
    differences = []
    for seed, images in enumerate(BATCHES):
        pixel_values = example_pixels(prompt, image_size, images, seed)
        differences.append(relative_difference(prompt(pixel_values), run(pixel_values)))
    differences = torch.cat(differences)
    tolerance, outliers = TOLERANCES[name]
    result = (
        f"{len(differences)} soft prompts, the median {differences.median():.1e} off, {differences.max():.1e} at most"
    )
    if not (differences <= tolerance).sum() >= len(differences) - outliers:
        raise RuntimeError(f"{path} does not give what the model gives: {result}, but {tolerance} is allowed.")
    print(f"  checked: {result}")


def load_exported(name: str, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a file of format `name` computes."""
    if name == "pt2":
        return torch.export.load(path).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(None, {PIXELS: pixel_values.numpy()})[0])


if __name__ == "__main__":
    main()
