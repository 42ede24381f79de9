"""Exports vision tower and connector, from pixels to soft prompt, as one file that runs without this repository.

    python examples/export.py --model outputs/demo --output_dir outputs/export --formats pt2 onnx --check true

`soft_prompt.pt2` is a graph of torch.export for any number of images. It computes on the CPU in the weights' dtype;
`torch.export.passes.move_to_device_pass` moves it to a GPU. The image processor's settings are stored in the file:

    files = {"image_processor.json": ""}
    program = torch.export.load("outputs/export/soft_prompt.pt2", extra_files=files).module()
    soft_prompt = program(pixel_values)  # (images, num_image_tokens, text_hidden_size)

`soft_prompt.onnx` (needs `.[export]`) is the same graph for onnxruntime, with the settings in its metadata. Weights of
over 2 GB lie in a second file. In the language model's input a soft prompt replaces the embeddings of placeholders.
EVLGen's `generate` takes it as `mm_encoder_outputs={"image": EVLGenImageOutput(pooler_output=soft_prompt)}`.

A graph makes one number of tokens of each image, by default the checkpoint's. `--num_image_tokens 16` exports another
number, for a checkpoint with an `image_token_range`. Its images have one grid of tiles, by default one tile.
`--tile_grid 2 3` exports a graph for images of 2 rows and 3 columns of tiles, `(images, 6, channels, height, width)`:
the processor's `pixel_values.unflatten(0, (-1, 6))`.

`--formats transformers.js` writes a folder for browsers and Node, which holds the language model as well. With
`--dtype int8` it takes a quarter. `--page true` adds a page that needs no server.

`--check true` compares both files with the model on 8 images, in batches of 1, 3 and 4. Differences are relative to
the soft prompt's largest value. For torch.export they must be at most 1e-5, and for onnxruntime at most 1e-3. One
image may exceed onnxruntime's limit: it sums in another order, and so may merge another of two equally similar pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from export_web import convert_to_onnx, export_web, write_web
from torch import nn
from transformers.hf_argparser import HfArg

from common.arguments import parse_arguments
from common.models import load_captioner, load_trainable
from common.processes import run_script
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.soft_prompts import join_tiles
from modeling_evlgen.video import encode_images
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import MAX_TILES

PIXELS, SOFT_PROMPT = "pixel_values", "soft_prompt"  # the ONNX graph's input and output
SETTINGS = "image_processor.json"
WEB = "transformers.js"
BATCH_SIZES = (1, 3, 4)
# Largest relative difference, and the number of images that may exceed it.
TOLERANCES = {"pt2": (1e-5, 0), "onnx": (1e-3, 1)}


@dataclass
class ExportArguments:
    model: str = HfArg(default="outputs/demo", help="Captioner: a folder or a name on the Hub.")
    output_dir: str = HfArg(default="outputs/export", help="Folder for the exported files.")
    formats: list[str] = HfArg(default_factory=lambda: ["pt2"], help="pt2, onnx or both, or transformers.js.")
    dtype: str = HfArg(default="float32", help="float32, or bfloat16 for pt2, or int8 for transformers.js.")
    num_image_tokens: int | None = HfArg(default=None, help="Tokens of a soft prompt. Default: the checkpoint's.")
    tile_grid: list[int] = HfArg(default_factory=lambda: [1, 1], help="Rows and columns of tiles of each image.")
    page: bool = HfArg(default=False, help="With transformers.js, add a page.")
    check: bool = HfArg(default=False, help="Compare the exported files with the model.")


def main(argv: list[str] | None = None) -> None:
    (arguments,) = parse_arguments(ExportArguments, argv=argv)
    check_arguments(arguments)
    if arguments.formats == [WEB]:
        export_for_web(arguments)
        return
    model = load_captioner(arguments.model, dtype=getattr(torch, arguments.dtype))
    processor = EVLGenProcessor.from_pretrained(arguments.model)
    image_processor = processor.image_processor
    prompt = SoftPrompt(model, arguments.num_image_tokens, tuple(arguments.tile_grid))
    tile_size = image_processor.size["height"], image_processor.size["width"]
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    if (max_tiles := processor.max_tiles) > 1 or prompt.tiles > 1:
        rows, columns = prompt.grid
        print(f"The graph takes images of {rows} x {columns} tiles. The processor's max_tiles is {max_tiles}.")
    program = export_graph(prompt, tile_size)
    files = {name: folder / f"soft_prompt.{name}" for name in arguments.formats}
    if "pt2" in files:
        torch.export.save(program, files["pt2"], extra_files={SETTINGS: image_processor.to_json_string()})
    if "onnx" in files:
        onnx_program = convert_to_onnx(program, PIXELS, SOFT_PROMPT)
        onnx_program.model.metadata_props[SETTINGS] = image_processor.to_json_string()
        onnx_program.save(files["onnx"])
    for name, path in files.items():
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        if arguments.check:
            compare(prompt, tile_size, name, path)


def export_for_web(arguments: ExportArguments) -> None:
    """Writes the folder for transformers.js. It has files of the same names as a checkpoint."""
    if Path(arguments.output_dir).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"`output_dir` must differ from the model's folder, but both are {arguments.model}.")
    model = load_trainable(arguments.model, dtype=torch.float32)  # an adapter may change the language model
    language_model = model.language_model  # `SoftPrompt` removes it
    prompt = SoftPrompt(model, arguments.num_image_tokens)
    processor = EVLGenProcessor.from_pretrained(arguments.model)
    graphs, files = export_web(prompt, language_model, processor, arguments.dtype)
    write_web(Path(arguments.output_dir), graphs, files, arguments.dtype, arguments.page)


def check_arguments(arguments: ExportArguments) -> None:
    """Raises a ValueError if there is no such format, dtype or grid, or onnxruntime does not support the dtype."""
    is_web = arguments.formats == [WEB]
    if not is_web and (set(arguments.formats) - set(TOLERANCES) or not arguments.formats):
        known = f"some of {', '.join(TOLERANCES)}, or {WEB} alone"
        raise ValueError(f"`formats` must be {known}, but is {arguments.formats}.")
    grid = arguments.tile_grid
    sides = grid if isinstance(grid, list) and len(grid) == 2 else [0]
    if not all(type(side) is int and side >= 1 for side in sides) or math.prod(sides) > MAX_TILES:
        wanted = f"two integers of 1 or more, for at most {MAX_TILES} tiles"
        raise ValueError(f"`tile_grid` must be {wanted}, but is {grid}.")
    given = {"tile_grid": grid != [1, 1], "check": arguments.check} if is_web else {"page": arguments.page}
    if any(given.values()):
        raise ValueError(f"`{max(given, key=given.get)}` is not for `formats` {' '.join(arguments.formats)}.")
    dtypes = ["float32"] if "onnx" in arguments.formats else ["float32", "int8" if is_web else "bfloat16"]
    if arguments.dtype not in dtypes:
        dtypes, formats = " or ".join(dtypes), " ".join(arguments.formats)
        raise ValueError(f"`dtype` must be {dtypes} with `formats` {formats}, but is {arguments.dtype!r}.")


class SoftPrompt(nn.Module):
    """Computes soft prompts from pixels with all parts of a model but its language model, which is removed from it.

    Each has `num_image_tokens` tokens, by default `config.num_image_tokens`. A number that the model was not trained
    for raises a ValueError, and so does a `grid` of several tiles for a model that takes one.
    """

    def __init__(
        self,
        model: EVLGenForConditionalGeneration,
        num_image_tokens: int | None = None,
        grid: tuple[int, int] = (1, 1),
    ):
        super().__init__()
        given = None if num_image_tokens is None else [num_image_tokens]
        (self.num_image_tokens,) = model.config.read_budgets("num_image_tokens", given, 1)
        self.grid, self.tiles = grid, math.prod(grid)
        if self.tiles > 1:
            model.config.check_tiles(f"`tile_grid` of {self.tiles} tiles")
        model.language_model = nn.Identity()
        self.model = model.eval().requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns the `pooler_output` of [`get_image_features`], `(images, num_image_tokens, text_hidden_size)`."""
        model, tower = self.model, self.model.vision_tower
        tiles = pixel_values.flatten(0, -4).to(tower.dtype)  # (images * tiles, channels, height, width)
        tokens = encode_images(tower, model.temporal, tiles)  # (images * tiles, num_vision_tokens, vision_hidden_size)
        # Not `project_vision_features`: it has lists of the images' grids, which would fix the number of images.
        tokens = model.vision_projection(model._normalize(tokens))  # (images * tiles, num_vision_tokens, dim)
        if self.tiles > 1:
            tokens = tokens.unflatten(0, pixel_values.shape[:2])  # (images, tiles, num_vision_tokens, dim)
            tokens = join_tiles(tokens, self.grid, model.config.connector_config.class_token)
        return model._connect(tokens, self.grid, self.num_image_tokens)[0]


def example_pixels(prompt: SoftPrompt, tile_size: tuple[int, int], images: int, seed: int = 0) -> torch.Tensor:
    """Noise, so that no two tokens are alike: `(images, channels, height, width)`, with tiles as second axis."""
    channels = getattr(prompt.model.config.vision_config, "num_channels", 3)
    generator = torch.Generator().manual_seed(seed)
    shape = (images, channels) if prompt.tiles == 1 else (images, prompt.tiles, channels)
    return torch.randn(*shape, *tile_size, generator=generator)


def export_graph(prompt: SoftPrompt, tile_size: tuple[int, int]) -> torch.export.ExportedProgram:
    """Exports the graph for any number of images, whose tiles have one height and width in pixels."""
    shapes = ({0: torch.export.Dim("images", min=1)},)
    # Without gradients a temporal contextualizer splits its batch, and the graph would fix the number of parts.
    with torch.enable_grad():
        return torch.export.export(prompt, (example_pixels(prompt, tile_size, 2),), dynamic_shapes=shapes)


@torch.no_grad()
def compare(prompt: SoftPrompt, tile_size: tuple[int, int], name: str, path: Path) -> None:
    """Compares an exported file with the model. Soft prompts that differ raise a RuntimeError."""
    run = load_exported(name, path)
    differences = []
    for seed, images in enumerate(BATCH_SIZES):
        pixel_values = example_pixels(prompt, tile_size, images, seed)
        expected = prompt(pixel_values)  # (images, num_image_tokens, text_hidden_size)
        largest = expected.abs().amax(dim=(1, 2))  # (images,)
        differences.append((expected - run(pixel_values)).abs().amax(dim=(1, 2)) / largest)
    differences = torch.cat(differences)
    tolerance, outliers = TOLERANCES[name]
    figures = f"median {differences.median():.1e}, largest {differences.max():.1e}"
    result = f"relative differences of {len(differences)} soft prompts: {figures}"
    # A NaN is not within the tolerance.
    if not (differences <= tolerance).sum() >= len(differences) - outliers:
        raise RuntimeError(f"{path} differs from the model: {result}, but {tolerance} is allowed.")
    print(f"  checked: {result}")


def load_exported(name: str, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Loads a file of format `name` as a function from pixels to soft prompts, with as many threads as PyTorch has."""
    if name == "pt2":
        return torch.export.load(path).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(None, {PIXELS: pixel_values.numpy()})[0])


if __name__ == "__main__":
    run_script(main)
