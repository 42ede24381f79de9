"""Runs a folder that `export.py --formats transformers.js` wrote in onnxruntime, by the rules of transformers.js."""

import json
from pathlib import Path

import numpy as np
import onnxruntime


class WebModel:
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

    def encode(self, image) -> np.ndarray:
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
