"""Converts a checkpoint of the original implementation (yiren-jian/EVLGen) to a folder that AutoModel loads.

    python examples/convert_original_checkpoint.py --checkpoint checkpoint_best.pth \
        --vision_model Salesforce/blip2-opt-2.7b --text_model facebook/opt-2.7b --output_dir evlgen-opt-2.7b

The original saves only the trained parts. The frozen towers come from their base models: EVA ViT-g, the vision tower
of any BLIP-2 checkpoint, and the language model. If the checkpoint holds the towers too, their weights come from it.
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.models import load_image_processor
from common.processes import run_script
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

_BLOCK = r"^visual_encoder\.blocks\.(\d+)\."
_LAYER = r"vision_tower.encoder.layers.\1."
RENAMED = {
    r"^ln_vision\.": "ln_vision.",
    r"^VL_proj\.": "vision_projection.",
    r"^VLconnector\.": "connector.",
    r"^(?:opt|llm)_proj\.": "language_projection.",
    r"^(?:opt|llm)_model\.": "language_model.",
    r"^visual_encoder\.cls_token$": "vision_tower.embeddings.class_embedding",
    r"^visual_encoder\.pos_embed$": "vision_tower.embeddings.position_embedding",
    r"^visual_encoder\.patch_embed\.proj\.": "vision_tower.embeddings.patch_embedding.",
    _BLOCK + r"temporal_merge\.": r"temporal.\1.",
    _BLOCK + r"norm([12])\.": _LAYER + r"layer_norm\2.",
    _BLOCK + r"attn\.(qkv\.weight|q_bias|v_bias)$": _LAYER + r"self_attn.\2",
    _BLOCK + r"attn\.proj\.": _LAYER + "self_attn.projection.",
    _BLOCK + r"mlp\.(fc[12])\.": _LAYER + r"mlp.\2.",
}
DROPPED = r"rotary_emb\.inv_freq$|embeddings\.position_ids$"  # buffers that today's models compute
TRAINED = ("ln_vision.", "vision_projection.", "connector.", "language_projection.", "temporal.")


def load_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Reads a dictionary of tensors without running code that the file may hold."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, some without a message
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"`checkpoint`: {path} is not a file of torch.save that holds tensors: {reason}") from error
    tensors = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(tensors, dict) or not tensors:
        found = "nothing" if tensors in ({}, None) else f"a {type(tensors).__name__}"
        raise ValueError(f"`checkpoint`: {path} must hold a dictionary of tensors, but holds {found}.")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError(f"`checkpoint`: {path} must hold tensors, but {name!r} is a {type(tensor).__name__}.")
    return tensors


def convert_state_dict(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the original's tensors to EVLGen's, and joins the vision tower's query and value biases."""
    converted, unknown = {}, []
    for name, tensor in original.items():
        if re.search(DROPPED, name):
            continue
        pattern = next((pattern for pattern in RENAMED if re.search(pattern, name)), None)
        if pattern is None:
            unknown.append(name)
        else:
            converted[re.sub(pattern, RENAMED[pattern], name)] = tensor
    if unknown:
        raise ValueError(f"Unknown tensors: {', '.join(unknown)}.")
    for name in [name for name in converted if name.endswith(".self_attn.q_bias")]:
        layer = name.removesuffix("q_bias")
        query, value = converted.pop(name), converted.pop(layer + "v_bias", None)
        if value is None:
            raise ValueError(f"Missing tensors: {layer}v_bias.")
        converted[layer + "qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])  # keys have no bias
    return converted


def infer_sizes(converted: dict[str, torch.Tensor]) -> tuple[dict[str, int], dict[str, int]]:
    """Reads fields of `TomeFormerConfig` and, with a temporal contextualizer, of `EVLGenConfig` from the shapes."""
    positions, hidden_size = _shape(converted, "connector.embeddings.position_embeddings.weight", 2)
    matches = (re.match(r"connector\.encoder\.layer\.(\d+)\.", name) for name in converted)
    layers = {int(match[1]) for match in matches if match}
    for number in range(len(layers)):  # a single tensor of layer 1000000 shall not make a million layers
        if number not in layers:
            raise ValueError(f"Missing tensors: connector.encoder.layer.{number}.")
    connector = {
        "hidden_size": hidden_size,
        "intermediate_size": _shape(converted, "connector.encoder.layer.0.intermediate.dense.bias", 1)[0],
        "num_hidden_layers": len(layers),
        "max_position_embeddings": positions,
        "type_vocab_size": _shape(converted, "connector.embeddings.token_type_embeddings.weight", 2)[0],
    }
    if not any(name.startswith("temporal.") for name in converted):
        return connector, {}
    hidden_size = _shape(converted, "temporal.0.query.weight", 2)[0]
    return connector, {"temporal_contextualizer": True, "temporal_hidden_size": hidden_size}


def _shape(converted: dict[str, torch.Tensor], name: str, ndim: int) -> torch.Size:
    if name not in converted:
        raise ValueError(f"Missing tensors: {name}.")
    if converted[name].ndim != ndim:
        raise ValueError(f"Misshapen tensors: {name} {tuple(converted[name].shape)}, not of {ndim} dimensions.")
    return converted[name].shape


def load_converted(model: EVLGenForConditionalGeneration, converted: dict[str, torch.Tensor]) -> None:
    """Loads converted tensors, possibly with towers. Tensors that do not fit the model raise a ValueError."""
    towers = [tower for tower in ("vision_tower.", "language_model.") if any(n.startswith(tower) for n in converted)]
    try:
        missing, unknown = model.load_state_dict(converted, strict=False)
    except RuntimeError as error:
        raise ValueError(f"Misshapen tensors: {error}") from error
    # The original's tower ends before BLIP-2's last norm, and a tied head is not always stored.
    optional = ("post_layernorm.weight", "post_layernorm.bias", "lm_head.weight")
    missing = [name for name in missing if name.startswith((*TRAINED, *towers)) and not name.endswith(optional)]
    for problem, names in (("Missing", missing), ("Unknown", unknown)):
        if names:
            raise ValueError(f"{problem} tensors: {', '.join(names)}.")


def load_language_model(
    name_or_path: str, llama: bool, **kwargs: str
) -> tuple[str | PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the tokenizer, and the Llama variant with the original's special tokens; other models stay a name."""
    if not llama:
        return name_or_path, AutoTokenizer.from_pretrained(name_or_path)
    language_model = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    # lavis/models/blip2_models/blip2_vicuna_instruct.py: `</s>` is the first, the last and the unknown token.
    special_tokens = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **special_tokens)
    tokenizer.add_bos_token = True  # makes the tokenizer add the new BOS token; the saved one would add `<s>`
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return language_model, tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="The original's .pth file.")
    parser.add_argument("--vision_model", required=True, help="EVA ViT-g: a folder or a name on the Hub.")
    parser.add_argument("--text_model", required=True, help="Language model: a folder or a name on the Hub.")
    parser.add_argument("--merge_r", type=int, default=19, help="Tokens merged in each layer.")
    parser.add_argument("--connector_num_attention_heads", type=int, default=12, help="The connector's heads.")
    dtypes = ["auto", "float32", "float16", "bfloat16"]
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="Towers' dtype; default: the text model's.")
    parser.add_argument("--output_dir", type=Path, required=True, help="New or empty folder to write to.")
    arguments = parser.parse_args(argv)

    # An adapter that stays beside the converted model would be applied to it.
    if arguments.output_dir.exists() and any(arguments.output_dir.iterdir()):
        raise ValueError(f"`output_dir` must be a new or empty folder, but {arguments.output_dir} holds files.")
    original = load_checkpoint(arguments.checkpoint)
    converted = convert_state_dict(original)
    connector, temporal = infer_sizes(converted)
    connector |= {"merge_r": arguments.merge_r, "num_attention_heads": arguments.connector_num_attention_heads}
    llama = any(name.startswith("llm_") for name in original)
    language_model, tokenizer = load_language_model(arguments.text_model, llama, dtype=arguments.dtype)
    image_processor = load_image_processor(arguments.vision_model)
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        arguments.vision_model,
        language_model,
        connector_config=connector,
        dtype=arguments.dtype,
        image_token_id=len(tokenizer),
        **temporal,
    )
    load_converted(model, converted)

    processor = EVLGenProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=model.config.num_image_tokens,
        clean_captions=True,
        end_of_text=None if llama else "\n",
        bos_label=not llama,
    )
    # The paper's decoding settings for captions.
    decoding = {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30, "repetition_penalty": 1.5 if llama else 1.0}
    decoding |= {"eos_token_id": processor.end_of_text_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config.update(**decoding)
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    print(model.describe_parameters())
    print(f"Converted {len(original)} tensors to {arguments.output_dir}.")


if __name__ == "__main__":
    run_script(main)
