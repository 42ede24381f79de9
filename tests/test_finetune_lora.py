"""LoRA of examples/finetune.py: which layers of which towers get an adapter; such adapters train and reload."""

import re

import pytest
import torch
from finetune import LoraArguments, add_lora, target_modules
from transformers import MixtralConfig, Phi3Config, Qwen2MoeConfig

from modeling_evlgen import EVLGenForConditionalGeneration

from . import helpers
from .helpers import TEXT_SIZES, noise_images, tiny_model, tiny_processor

_GROUPED = {**TEXT_SIZES, "intermediate_size": 64, "num_key_value_heads": 1}  # fewer heads for keys and values
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 1}
_MOE_SIZES = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MORE_TEXT_CONFIGS = {
    "phi3": Phi3Config(**_GROUPED),
    "mixtral": MixtralConfig(**_EXPERTS, num_local_experts=2),
    "qwen2_moe": Qwen2MoeConfig(**_EXPERTS, num_experts=2, **_MOE_SIZES),
}
# The linear layers in the blocks of each tower. The experts of a layer are one tensor, and so no linear layers.
TEXT = {"opt": 12, "llama": 14, "qwen2": 14, "gpt2": 8, "phi3": 8, "mixtral": 8, "qwen2_moe": 16}
VISION = {"eva": 8, "clip": 12, "siglip": 12, "dinov2": 12, "vit": 12, "timm_vit": 4, "convnext": 8}
CASES = [("text", *case) for case in TEXT.items()] + [("vision", *case) for case in VISION.items()]


@pytest.fixture(autouse=True)
def more_language_models(monkeypatch):
    monkeypatch.setattr(helpers, "TEXT_CONFIGS", helpers.TEXT_CONFIGS | MORE_TEXT_CONFIGS)


def step(model):
    """Loss of a small batch, with gradients."""
    batch = tiny_processor(model)(images=noise_images(2), suffix=["a red circle", "a blue triangle"])
    return model(**batch).loss


def test_blocks_that_differ_are_told_apart():
    """PEFT refuses an identity, and would adapt a convolution."""
    layers = adapted_layers(add_lora(tiny_model(), LoraArguments()))
    model = tiny_model()
    model.language_model.model.layers[1].mlp.down_proj = torch.nn.Identity()
    model.language_model.model.layers[0].self_attn.o_proj = torch.nn.Conv2d(1, 1, 1)
    left_out = {f"language_model.model.layers.{name}" for name in ("1.mlp.down_proj", "0.self_attn.o_proj")}
    assert left_out < layers and adapted_layers(add_lora(model, LoraArguments())) == layers - left_out


def adapted_layers(adapted):
    return {name for name, layer in adapted.base_model.model.named_modules() if hasattr(layer, "lora_A")}


@pytest.mark.parametrize(("lora", "name", "count"), CASES)
def test_adapters_of_the_linear_layers_of_each_block_are_trained_saved_and_loaded(lora, name, count, tmp_path):
    tiny_model(**{lora: name}).save_pretrained(tmp_path / "base")
    model = EVLGenForConditionalGeneration.from_pretrained(tmp_path / "base")
    adapted = add_lora(model, LoraArguments(lora=lora, lora_r=2, lora_dropout=0.0)).train()
    tower = {"text": "language_model", "vision": "vision_tower"}[lora]
    layers = adapted_layers(adapted)
    assert len(layers) == count and all(re.match(rf"{tower}\..*\.\d+\.", layer) for layer in layers)

    trained = {key: weights for key, weights in adapted.named_parameters() if weights.requires_grad}
    before = {key: weights.detach().clone() for key, weights in trained.items() if "lora_B" in key}
    step(adapted).backward()
    torch.optim.SGD(trained.values(), lr=0.1).step()
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
