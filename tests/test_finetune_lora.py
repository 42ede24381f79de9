"""LoRA of examples/finetune.py: which layers of which towers get an adapter; such adapters train and reload."""

import pytest
import torch
from finetune import LoraArguments, add_lora, target_modules
from transformers import (
    MixtralConfig,
    Phi3Config,
    Qwen2MoeConfig,
)

from modeling_evlgen import EVLGenForConditionalGeneration

from . import helpers
from .helpers import TEXT_SIZES, tiny_model

_GROUPED = {**TEXT_SIZES, "intermediate_size": 64, "num_key_value_heads": 1}  # fewer heads for keys and values
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 1}
MORE_TEXT_CONFIGS = {
    "phi3": Phi3Config(**_GROUPED),
    "mixtral": MixtralConfig(**_EXPERTS, num_local_experts=2),
    "qwen2_moe": Qwen2MoeConfig(
        **_EXPERTS, num_experts=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
}
_LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
_GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
_CLIP = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
_VIT = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"]
# Type: where its blocks are, and the adapted layers of each.
TEXT_LAYERS = {
    "opt": ("model.decoder.layers", [*_CLIP[:4], "fc1", "fc2"]),
    "llama": ("model.layers", _LLAMA + _GATED),
    "qwen2": ("model.layers", _LLAMA + _GATED),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "phi3": ("model.layers", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    # The experts of a layer are one tensor, not linear layers.
    "mixtral": ("model.layers", _LLAMA),
    "qwen2_moe": (
        "model.layers",
        [*_LLAMA, *(f"mlp.shared_expert.{name.removeprefix('mlp.')}" for name in _GATED), "mlp.shared_expert_gate"],
    ),
}
VISION_LAYERS = {
    "eva": ("encoder.layers", ["self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2"]),
    "clip": ("encoder.layers", _CLIP),
    "siglip": ("encoder.layers", _CLIP),
    "dinov2": ("encoder.layer", _VIT),
    "vit": ("layers", _VIT),
    "timm_vit": ("timm_model.blocks", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]),
    "convnext": ("encoder.stages", ["layers.0.pwconv1", "layers.0.pwconv2"]),
}
CASES = [("text", name) for name in TEXT_LAYERS] + [("vision", name) for name in VISION_LAYERS]


@pytest.fixture(autouse=True)
def more_language_models(monkeypatch):
    monkeypatch.setattr(helpers, "TEXT_CONFIGS", helpers.TEXT_CONFIGS | MORE_TEXT_CONFIGS)


def step(model):
    """Loss of a small batch, with gradients."""
    config = model.config
    torch.manual_seed(0)
    words = torch.randint(3, 299, (2, 6))
    images = torch.full((2, config.num_image_tokens), config.image_token_id)
    input_ids = torch.cat([images, words], dim=1)
    labels = input_ids.masked_fill(input_ids == config.image_token_id, -100)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    return model(pixel_values=torch.randn(2, 3, 32, 32), **inputs).loss


@pytest.mark.parametrize(("lora", "name"), CASES)
def test_adapters_go_to_the_linear_layers_of_each_block(lora, name):
    model = tiny_model(**{lora: name})
    tower, layers = ("language_model", TEXT_LAYERS) if lora == "text" else ("vision_tower", VISION_LAYERS)
    prefix, names = layers[name]
    blocks = {"convnext": 4, "timm_vit": 1}.get(name, 2)
    expected = {f"{tower}.{prefix}.{block}.{layer}" for block in range(blocks) for layer in names}
    adapted = add_lora(model, LoraArguments(lora=lora))
    found = {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert found == expected


def test_blocks_that_differ_are_told_apart():
    """PEFT refuses an identity, and would adapt a convolution."""
    model = tiny_model()
    model.language_model.model.layers[1].mlp.down_proj = torch.nn.Identity()
    model.language_model.model.layers[0].self_attn.o_proj = torch.nn.Conv2d(1, 1, 1)
    layers = {f"language_model.model.layers.{block}.{name}" for block in (0, 1) for name in _LLAMA + _GATED}
    left_out = {"language_model.model.layers.1.mlp.down_proj", "language_model.model.layers.0.self_attn.o_proj"}
    found = {name for name, layer in add_lora(model, LoraArguments()).named_modules() if hasattr(layer, "lora_A")}
    assert found == {f"base_model.model.{name}" for name in layers - left_out}


@pytest.mark.parametrize(("lora", "name"), CASES)
def test_an_adapter_is_trained_one_step_saved_and_loaded(lora, name, tmp_path):
    model = tiny_model(**{lora: name})
    model.save_pretrained(tmp_path / "base")
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = add_lora(model, LoraArguments(lora=lora, lora_r=2, lora_dropout=0.0)).train()
    trained = {key: weights for key, weights in adapted.named_parameters() if weights.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    before = {key: weights.detach().clone() for key, weights in trained.items() if "lora_B" in key}
    step(adapted).backward()
    optimizer.step()
    changed = {key for key, weights in before.items() if not torch.equal(weights, trained[key])}
    assert changed and changed == before.keys()  # all of them: none is beside what the loss passes through
    adapted.save_pretrained(tmp_path / "adapter")
    expected = step(adapted.eval())
    loaded = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(step(loaded), expected)


def test_a_tower_without_linear_layers_in_blocks_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`lora` is 'both', but the vision tower \('timm_wrapper'\) has no linear"):
        target_modules(tiny_model("timm_cnn"), "both")
    target_modules(tiny_model("timm_cnn"), "text")


def test_what_is_trained_beside_an_adapter_is_counted_once():
    model = tiny_model()
    before = dict(line.split(": ") for line in model.describe_parameters().splitlines())
    after = dict(line.split(": ") for line in add_lora(model, LoraArguments()).describe_parameters().splitlines())
    assert before["language_model"].endswith("frozen") and after["language_model"].endswith(" of them trained")
    assert {name for name in before if before[name] != after[name]} == {"language_model"}
