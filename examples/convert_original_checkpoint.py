"""Converts a checkpoint of the original implementation (yiren-jian/EVLGen) to a folder that AutoModel loads.

    python examples/convert_original_checkpoint.py --checkpoint checkpoint_best.pth \
        --vision_model Salesforce/blip2-opt-2.7b --text_model facebook/opt-2.7b --output_dir evlgen-opt-2.7b

The original saves what it trained, so the frozen towers come from where it took them: EVA ViT-g (the vision tower of
any BLIP-2 checkpoint) and the language model. A checkpoint that holds the towers as well replaces their weights.
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from common.models import load_image_processor
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
DROPPED = r"rotary_emb\.inv_freq$|embeddings\.position_ids$"  # buffers that are computed now
TRAINED = ("ln_vision.", "vision_projection.", "connector.", "language_projection.", "temporal.")


def convert_state_dict(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames the original's tensors to EVLGen's, and joins the vision tower's query and value biases.

    Raises:
        ValueError: If there are tensors that the original does not have; the message names them.
    """
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
    """What the tensors' shapes tell about the connector and the temporal contextualizer.

    Returns:
        Fields of `TomeFormerConfig`, and of `EVLGenConfig`.
    """
    positions, hidden_size = _shape(converted, "connector.embeddings.position_embeddings.weight")
    connector = {
        "hidden_size": hidden_size,
        "intermediate_size": _shape(converted, "connector.encoder.layer.0.intermediate.dense.bias")[0],
        "num_hidden_layers": 1
        + max(int(n.split(".")[3]) for n in converted if n.startswith("connector.encoder.layer.")),
        "max_position_embeddings": positions,
        "type_vocab_size": _shape(converted, "connector.embeddings.token_type_embeddings.weight")[0],
    }
    if not any(name.startswith("temporal.") for name in converted):
        return connector, {}
    hidden_size = _shape(converted, "temporal.0.query.weight")[0]
    return connector, {"temporal_contextualizer": True, "temporal_hidden_size": hidden_size}


def _shape(converted: dict[str, torch.Tensor], name: str) -> torch.Size:
    if name not in converted:
        raise ValueError(f"Missing tensors: {name}.")
    return converted[name].shape


def load_converted(model: EVLGenForConditionalGeneration, converted: dict[str, torch.Tensor]) -> None:
    """Loads converted tensors into a model whose towers may or may not be among them.

    Raises:
        ValueError: If tensors are missing, of another shape, or unknown to this model; the message names them.
    """
    expected = model.state_dict()
    held = [part for part in ("vision_tower.", "language_model.") if any(name.startswith(part) for name in converted)]
    wanted = {name for name in expected if name.startswith((*TRAINED, *held))}
    # BLIP-2's last norm is not part of the tower, and a tied head may be stored or not.
    optional = {name for name in wanted if "post_layernorm" in name or name.endswith("lm_head.weight")}
    problems = {
        "Missing": wanted - optional - converted.keys(),
        "Unknown": converted.keys() - expected.keys(),
        "Misshapen": {
            f"{name} {tuple(tensor.shape)} for {tuple(expected[name].shape)}"
            for name, tensor in converted.items()
            if name in expected and tensor.shape != expected[name].shape
        },
    }
    found = [f"{kind} tensors: {', '.join(sorted(names))}." for kind, names in problems.items() if names]
    if found:
        raise ValueError(" ".join(found))
    model.load_state_dict(converted, strict=False)


def load_language_model(
    name_or_path: str, llama: bool, **kwargs: str
) -> tuple[str | PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model, by its name where it stays as it is, and its tokenizer; the Llama variant has the original's
    special tokens."""
    if not llama:
        return name_or_path, AutoTokenizer.from_pretrained(name_or_path)
    language_model = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    # lavis/models/blip2_models/blip2_vicuna_instruct.py: `</s>` begins, ends and stands for unknown words.
    odd = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    tokenizer = AutoTokenizer.from_pretrained(name_or_path, **odd)
    tokenizer.add_bos_token = True  # the new one, in place of the one that the saved tokenizer adds
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return language_model, tokenizer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="The original's .pth file.")
    parser.add_argument("--vision_model", required=True, help="EVA ViT-g: a folder or a name on the Hub.")
    parser.add_argument("--text_model", required=True, help="The language model: a folder or a name on the Hub.")
    parser.add_argument("--merge_r", type=int, default=19, help="Tokens merged in each layer.")
    parser.add_argument("--connector_num_attention_heads", type=int, default=12, help="Heads of the connector.")
    parser.add_argument("--dtype", default="auto", help="dtype of the frozen towers. Default: the language model's.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where to write the converted checkpoint.")
    arguments = parser.parse_args(argv)

    checkpoint = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
    original = checkpoint.get("model", checkpoint)
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
    # The paper's decoding of captions.
    decoding = {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30, "repetition_penalty": 1.5 if llama else 1.0}
    model.generation_config.update(
        eos_token_id=processor.end_of_text_id, pad_token_id=tokenizer.pad_token_id, **decoding
    )
    model.save_pretrained(arguments.output_dir)
    processor.save_pretrained(arguments.output_dir)
    print(model.describe_parameters())
    print(f"Converted {len(original)} tensors to {arguments.output_dir}.")


if __name__ == "__main__":
    main()
