"""Writes the folder that transformers.js runs as a LLaVA model, for `export.py --formats transformers.js`.

Its LLaVA runs three files: pixels to soft prompt, token ids to embeddings, and embeddings to the next token's scores.
"""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

IMAGE = {"type": "image"}
EXAMPLES = Path(__file__).parent
PAGE = EXAMPLES / "web_page"
BLOCK = 32  # weights with one scale
MAX_BYTES = 2**31 - 1  # of a protobuf, and of a browser's buffers
MATRICES = {("MatMul", 1), ("Gemm", 1), ("Gather", 0)}  # operators, and the input that is quantised
RESIZE_MODES = {2: "linear", 3: "cubic"}  # by the numbers of PIL
# transformers.js obeys these as `generate` does. It has no beams.
GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "min_new_tokens")


def export_web(
    prompt: nn.Module, language_model: PreTrainedModel, processor: EVLGenProcessor, dtype: str
) -> tuple[dict[str, Any], dict[str, dict]]:
    """Returns graphs and JSON files by name. `prompt` is a [`SoftPrompt`], and `dtype` float32 or int8.

    Raises a ValueError that names what transformers.js cannot run.
    """
    check_web(prompt.model.config, processor)
    files = describe(prompt.model, processor, prompt.num_image_tokens, dtype)
    try:
        graphs = {
            "vision_encoder": export_vision(prompt, processor.image_processor),
            "embed_tokens": export_embedding(language_model.get_input_embeddings(), prompt.model.config),
            "decoder_model_merged": export_decoder(language_model),
        }
    except (RuntimeError, TypeError, ValueError) as error:  # where code depends on values
        towers = f"{type(prompt.model.vision_tower).__name__} or {type(language_model).__name__}"
        raise ValueError(f"`model`: {towers} cannot be exported, since no graph does for all inputs.") from error
    for name, graph in graphs.items():
        if dtype == "int8":
            quantize(graph.graph)
        size = sum(value.const_value.nbytes for value in graph.graph.initializers.values())
        if size > MAX_BYTES:
            raise ValueError(f"`model`: its {name} would be a file of {size / 1e9:.1f} GB, but 2 GB are the limit.")
    return graphs, files


def check_web(config: EVLGenConfig, processor: EVLGenProcessor) -> None:
    """Raises a ValueError that names what transformers.js cannot run."""
    if config.is_for_videos:
        raise ValueError("`model` is for videos, which transformers.js does not read.")
    if processor.max_tiles > 1:
        raise ValueError(f"`model`: its processor's `max_tiles` must be 1, but is {processor.max_tiles}.")
    images = processor.image_processor
    size = dict(images.size)
    crops = getattr(images, "do_center_crop", None) and dict(images.crop_size) != size
    is_fixed = images.do_resize and not crops and size.get("height") and size.get("width")
    if not is_fixed or int(images.resample) not in RESIZE_MODES:
        wanted = "resize to a fixed height and width, bilinear or bicubic, and crop nothing"
        raise ValueError(f"`model`: its image processor must {wanted}, but is {images.to_json_string()}.")
    if not processor.tokenizer.is_fast:
        raise ValueError("`model` must have a tokenizer with a tokenizer.json, but has none.")


def write_web(folder: Path, graphs: dict[str, Any], files: dict[str, dict], dtype: str, page: bool) -> None:
    """Writes graphs and JSON files, and with `page` a page that shows them."""
    import onnx_ir

    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    size, digest = len(json.dumps(files["tokenizer.json"])), hashlib.sha256(json.dumps(files).encode())
    for name, graph in graphs.items():
        # By transformers.js' names. Files of the other dtype would be published with these.
        suffixes = ("_quantized", "") if dtype == "int8" else ("", "_quantized")
        path, other = (folder / "onnx" / f"{name}{suffix}.onnx" for suffix in suffixes)
        other.unlink(missing_ok=True)
        onnx_ir.save(graph, path)
        size += path.stat().st_size
        digest.update(path.read_bytes())
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    # The page tells the size, and its cache of another version is out of date.
    files["config.json"]["download"] = {"megabytes": size / 1e6, "version": f"evlgen-{digest.hexdigest()[:16]}"}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    if page:
        shutil.copytree(PAGE, folder, dirs_exist_ok=True)
        print(f"Start `python -m http.server --directory {folder}`, and open http://localhost:8000")


class ResizedPixels(nn.Module):
    """Soft prompts of images of any size: the image processor, then a [`SoftPrompt`].

    transformers.js itself resizes as a canvas does, or without antialiasing. ONNX's `Resize` of bytes does it as PIL.
    """

    def __init__(self, prompt: nn.Module, image_processor: Any):
        super().__init__()
        self.prompt, self.mode = prompt, RESIZE_MODES[int(image_processor.resample)]
        self.size = image_processor.size["height"], image_processor.size["width"]
        factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        normalizes = image_processor.do_normalize
        mean_and_std = [image_processor.image_mean, image_processor.image_std] if normalizes else [[0.0], [1.0]]
        self.register_buffer("mean_and_std", torch.tensor(mean_and_std)[:, :, None, None] / factor)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Soft prompts, `(batch, num_image_tokens, text_hidden_size)`, of levels from 0 to 255, float32."""
        cubic = {"cubic_coeff_a": -0.5, "exclude_outside": 1} if self.mode == "cubic" else {}
        resized = torch.onnx.ops.symbolic(
            "Resize",
            (pixel_values.to(torch.uint8), None, None, torch.tensor(self.size)),
            {"mode": self.mode, "antialias": 1, "axes": [2, 3], **cubic},
            dtype=torch.uint8,
            shape=(*pixel_values.shape[:2], *self.size),
        )
        mean, std = self.mean_and_std
        return self.prompt((resized.float() - mean) / std)


def export_vision(prompt: nn.Module, image_processor: Any) -> Any:
    """The graph from images to soft prompts, an `onnx_ir.Model`."""
    pixels, dims = torch.zeros(2, 3, 40, 50), {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(ResizedPixels(prompt, image_processor), (pixels,), dynamic_shapes=(dims,))
    return convert_to_onnx(program, "pixel_values", "image_features").model


def export_embedding(embedding: nn.Module, config: EVLGenConfig) -> Any:
    """The graph from token ids to embeddings. Placeholders beyond the language model's have rows of zeros."""
    known = embedding.num_embeddings
    missing = max(config.image_token_id + 1 - known, config.video_token_id + 1 - known, 0)
    with torch.no_grad():
        rows = embedding(torch.arange(known))  # (known, dim): the module may scale its weights
    table = nn.Embedding.from_pretrained(nn.functional.pad(rows, (0, 0, 0, missing)))
    ids, dims = torch.zeros(2, 3, dtype=torch.long), {0: Dim.AUTO, 1: Dim.AUTO}
    program = torch.export.export(table, (ids,), dynamic_shapes=(dims,))
    return convert_to_onnx(program, "input_ids", "inputs_embeds").model


def convert_to_onnx(program: torch.export.ExportedProgram, name: str, output_name: str) -> Any:
    """Converts a graph with one input and one output to a `torch.onnx.ONNXProgram`."""
    try:
        return torch.onnx.export(program, input_names=[name], output_names=[output_name], verbose=False)
    except ImportError as error:
        raise ImportError('ONNX needs further packages. Install them with: pip install -e ".[export]"') from error


def export_decoder(language_model: PreTrainedModel) -> Any:
    """The graph from embeddings and a cache to the scores of the next token."""
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    width, cache = language_model.get_input_embeddings().weight.shape[1], DynamicCache()
    with torch.no_grad():
        language_model(inputs_embeds=torch.randn(2, 3, width), cache=cache, use_cache=True)
    inputs = {
        "inputs_embeds": torch.randn(2, 4, width),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "position_ids": torch.arange(3, 7).repeat(2, 1),
        "cache": cache,
        "logits_to_keep": 1,
        "use_cache": True,
    }
    rows = {0: Dim.AUTO, 1: Dim.AUTO}
    dims = dict.fromkeys(("inputs_embeds", "attention_mask", "position_ids"), rows)
    dims |= {"cache": [{0: Dim.AUTO, 2: Dim.AUTO}] * (2 * len(cache.layers)), "logits_to_keep": None}
    model = OnnxExporter().export(language_model, inputs, OnnxConfig(dynamic_shapes=dims)).program
    name_as_transformers_js(model.graph)
    return model


def name_as_transformers_js(graph: Any) -> None:
    """Gives inputs, outputs and their dimensions the names by which transformers.js makes the first, empty cache."""
    import onnx_ir

    lengths = {"attention_mask": "total_sequence_length", "logits": 1}
    for prefix, length, values in (("past_key_values", "past", graph.inputs), ("present", "total", graph.outputs)):
        for value in values:
            dims, name = ["batch_size", *value.shape[1:]], value.name
            if found := re.search(r"layers\.(\d+)\.(key|value)s$", name):
                value.name = f"{prefix}.{found[1]}.{found[2]}"
            dims[2 if found else 1] = f"{length}_sequence_length" if found else lengths.get(name, "sequence_length")
            value.shape = onnx_ir.Shape(dims)


def quantize(graph: Any) -> None:
    """Stores matrices in 8 bits: 32 weights of a column, or of an embedding, have one float16 scale.

    The runtime restores them when it loads the file. So all computes in float32, as PyTorch does.
    """
    import onnx_ir

    tape = onnx_ir.tape.Tape(graph)
    for name, value in list(graph.initializers.items()):
        uses = {(use.node.op_type, use.idx) for use in value.uses()}
        if value.dtype != onnx_ir.DataType.FLOAT or len(value.shape) != 2 or not uses <= MATRICES:
            continue
        weights, axis = torch.tensor(value.const_value.numpy()), int(uses == {("Gather", 0)})
        blocks = weights.unflatten(axis, (-1, math.gcd(weights.shape[axis], BLOCK)))
        scales = (blocks.abs().amax(axis + 1, keepdim=True) / 127).clamp(min=2**-24).half()
        levels = (blocks / scales.float()).round().clamp(-127, 127).to(torch.int8)
        parts = {"levels": levels, "scales": scales, "shape": torch.tensor(weights.shape)}
        parts = [tape.initializer(onnx_ir.tensor(part.numpy()), f"{name}.{kind}") for kind, part in parts.items()]
        levels, scales = (tape.op("Cast", [part], {"to": onnx_ir.DataType.FLOAT}) for part in parts[:2])
        value.replace_all_uses_with(tape.op("Reshape", [tape.op("Mul", [levels, scales]), parts[2]]))
        del graph.initializers[name]
    graph.insert_before(graph[0], tape.nodes)


def describe(model: EVLGenForConditionalGeneration, processor: EVLGenProcessor, budget: int, dtype: str) -> dict:
    """The JSON files beside the graphs, by name. Raises a ValueError if prompts would differ from the processor's."""
    text, tokenizer = model.config.text_config.get_text_config(), processor.tokenizer
    settings = model.generation_config.to_dict()
    generation = {name: settings[name] for name in GENERATION if settings.get(name) is not None}
    generation["suppress_tokens"] = [model.config.image_token_id, model.config.video_token_id]
    tokens = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens |= {"post_processor": None, "padding": None, "truncation": None}  # the template adds the special tokens
    files = {
        # Any text model would do: the cache's shapes are those of the decoder's inputs.
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": model.config.image_token_id,
            "text_config": {"model_type": "llama", "num_hidden_layers": text.num_hidden_layers},
            "transformers.js_config": {"dtype": "q8" if dtype == "int8" else "fp32"},
        },
        "generation_config.json": {"max_new_tokens": 30, **generation},
        # Pixels go on as they are.
        "preprocessor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_processor_type": "CLIPImageProcessor",
            **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_center_crop"), False),
        },
        # transformers.js counts height // patch_size * width // patch_size placeholders more.
        "processor_config.json": {
            "image_token": processor.image_token,
            "patch_size": 2**30,
            "num_additional_image_tokens": budget,
        },
        "tokenizer.json": tokens,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizer",
            "clean_up_tokenization_spaces": False,
            "chat_template": web_template(processor),
            **{name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
        },
    }
    check_prompts(files, processor, budget)
    return files


def web_template(processor: EVLGenProcessor) -> str:
    """A chat template that writes prompts with their special tokens, as the processor does."""
    added = processor.tokenizer.decode(processor.tokenizer("").input_ids)
    if processor.chat_template is None:
        plain = (EXAMPLES / "plain_chat_template.jinja").read_text(encoding="utf-8").strip()
        return plain.replace("(bos_token or '')", json.dumps(added))
    joined = "{'role': message.role, 'content': text.value}"  # the Jinja of transformers.js has no `dict`
    template = processor.chat_template.replace("dict(message, content=text.value)", joined)
    prompt = processor.apply_chat_template([{"role": "user", "content": [IMAGE]}], add_generation_prompt=True)
    return template if prompt.startswith(added) else f"{{{{ {json.dumps(added)} }}}}{template}"


def check_prompts(files: dict[str, dict], processor: EVLGenProcessor, budget: int) -> None:
    """Raises a ValueError if the exported tokenizer and template give other ids than the processor."""
    backend = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    exported = PreTrainedTokenizerFast(tokenizer_object=backend, **files["tokenizer_config.json"])
    for question in ("", "What is it?"):
        messages = [{"role": "user", "content": [IMAGE, {"type": "text", "text": question}][: 1 + bool(question)]}]
        prompt = exported.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = exported(prompt.replace(processor.image_token, processor.image_token * budget))["input_ids"]
        inputs = processor(images=Image.new("RGB", (8, 8)), text=question, num_image_tokens=budget)
        expected = inputs["input_ids"][0].tolist()
        if ids != expected:
            raise ValueError(f"`model`: its chat template cannot be exported. {prompt!r} gives {ids}, not {expected}.")
