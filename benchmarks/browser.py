"""Compares folders that `export.py --formats transformers.js` wrote with the model itself, on the demo's test scenes.

    python -m benchmarks.browser --model outputs/demo --folders outputs/web-float32 outputs/web --scenes 200

prints megabytes, the scenes whose ids are those of `generate`, and median seconds of a caption, from pixels to ids.
Candidates take turns with one thread each. The folders run in onnxruntime, by the rules of transformers.js.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image
from tqdm import tqdm

from common.demo.scenes import load_scenes
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .results import markdown_table
from .timing import measure


class WebModel:
    """A folder for transformers.js, in onnxruntime."""

    def __init__(self, folder: Path):
        self.config, self.settings = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")
        )
        suffix = {"q8": "_quantized", "fp32": ""}[self.config["transformers.js_config"]["dtype"]]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {
            name: onnxruntime.InferenceSession(folder / "onnx" / f"{name}{suffix}.onnx", options)
            for name in ("vision_encoder", "embed_tokens", "decoder_model_merged")
            if (folder / "onnx" / f"{name}{suffix}.onnx").exists()
        }

    def encode(self, image: Image.Image) -> np.ndarray:
        """The soft prompt of a PIL image, `(tokens, dim)`."""
        pixels = np.asarray(image).transpose(2, 0, 1)[None].astype(np.float32)  # (1, 3, height, width)
        return self.sessions["vision_encoder"].run(["image_features"], {"pixel_values": pixels})[0][0]

    def generate(self, prompt: np.ndarray, input_ids: list[int], num_tokens: int) -> list[int]:
        """The ids that follow `input_ids`, whose placeholders take a soft prompt, `(tokens, dim)`."""
        decoder, ids = self.sessions["decoder_model_merged"], np.array([input_ids])
        embeds = self.embed(ids)  # (1, sequence, dim)
        embeds[ids == self.config["image_token_index"]] = prompt
        cache = {entry.name: self.empty(entry.shape) for entry in decoder.get_inputs() if entry.name in self.names}
        names = [output.name for output in decoder.get_outputs()]
        generated: list[int] = []
        while len(generated) < num_tokens and self.settings.get("eos_token_id") not in generated:
            total = len(input_ids) + len(generated)
            positions = np.arange(total)[None, -embeds.shape[1] :]
            inputs = {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": positions,
            }
            outputs = dict(zip(names, decoder.run(names, {**inputs, **cache}), strict=True))
            scores = outputs.pop("logits")[0, -1]  # (vocab,)
            scores[[index for index in self.settings["suppress_tokens"] if index < len(scores)]] = -np.inf
            generated.append(int(scores.argmax()))
            embeds = self.embed(np.array([generated[-1:]]))
            cache = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        return generated

    def embed(self, ids: np.ndarray) -> np.ndarray:
        return self.sessions["embed_tokens"].run(["inputs_embeds"], {"input_ids": ids})[0]

    @property
    def names(self) -> set[str]:
        """The names of the cache, which follow from the configuration alone."""
        layers = range(self.config["text_config"]["num_hidden_layers"])
        return {f"past_key_values.{layer}.{kind}" for layer in layers for kind in ("key", "value")}

    def empty(self, shape: list[int | str]) -> np.ndarray:
        """An empty cache: of all named dimensions, only `batch_size` is not 0."""
        sizes = {"batch_size": 1}
        return np.zeros([size if isinstance(size, int) else sizes.get(size, 0) for size in shape], np.float32)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo", help="The exported checkpoint. Default: outputs/demo.")
    parser.add_argument("--folders", nargs="+", type=Path, default=[Path("outputs/web")], help="Default: outputs/web.")
    parser.add_argument("--scenes", type=int, default=200, help="Number of test scenes. Default: 200, all.")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = EVLGenForConditionalGeneration.from_pretrained(arguments.model)
    processor = EVLGenProcessor.from_pretrained(arguments.model)
    scenes = load_scenes()["test"]["image"][: arguments.scenes]
    print(compare(model, processor, Path(arguments.model), arguments.folders, scenes))


def compare(model: Any, processor: Any, checkpoint: Path, folders: list[Path], images: list[Image.Image]) -> str:
    """Markdown table of the checkpoint and the folders."""
    web = {folder: WebModel(folder) for folder in folders}
    limit = model.generation_config.max_new_tokens or 30
    ids: dict[Path, list[int]] = {}

    def run(path: Path, image: Image.Image) -> None:
        inputs = processor(images=[image])
        if path == checkpoint:
            new = model.generate(**inputs, do_sample=False, max_new_tokens=limit)
            ids[path] = new[0, inputs["input_ids"].shape[1] :].tolist()
        else:
            prompt = web[path].encode(image.convert("RGB"))
            ids[path] = web[path].generate(prompt, inputs["input_ids"][0].tolist(), limit)

    seconds: dict[Path, list[float]] = {path: [] for path in (checkpoint, *folders)}
    equal = dict.fromkeys(seconds, 0)
    for image in tqdm(images, leave=False):
        for path in seconds:
            seconds[path].append(measure(lambda path=path, image=image: run(path, image)))
            equal[path] += ids[path] == ids[checkpoint]
    rows = [
        [path, f"{megabytes(path):.0f}", equal[path], f"{statistics.median(times):.2f}"]
        for path, times in seconds.items()
    ]
    return markdown_table(["folder", "MB of weights", f"equal of {len(images)}", "seconds"], rows)


def megabytes(folder: Path) -> float:
    files = [path for pattern in ("*.safetensors", "onnx/*.onnx*") for path in folder.glob(pattern)]
    return sum(path.stat().st_size for path in files) / 1e6


if __name__ == "__main__":
    main()
