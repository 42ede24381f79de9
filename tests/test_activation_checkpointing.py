"""Activations of a frozen language model's layers: dropped and computed again, to the same loss and gradients."""

import pytest
import torch

from .helpers import TEXT_CONFIGS, noise_images, tiny_model, tiny_processor

# 8 layers that would drop something out if they were in training.
DEEP = {
    "opt": {"num_hidden_layers": 8, "dropout": 0.5, "layerdrop": 0.5},
    "llama": {"num_hidden_layers": 8, "attention_dropout": 0.5},
    "qwen2": {"num_hidden_layers": 8, "attention_dropout": 0.5, "layer_types": None},
    "gpt2": {"n_layer": 8, "resid_pdrop": 0.5, "attn_pdrop": 0.5},
}


@pytest.fixture(autouse=True)
def deep_language_models(monkeypatch):
    for name, config in TEXT_CONFIGS.items():
        monkeypatch.setitem(TEXT_CONFIGS, name, type(config)(**{**config.to_dict(), **DEEP[name]}))


def build(text, **connector):
    model = tiny_model(text=text, num_hidden_layers=1, **connector)
    captions = {"text": ["what is it?", "what?"], "suffix": ["a red circle", "a cat"]}
    return model, tiny_processor(model)(images=noise_images(2), **captions)


def training_step(model, batch):
    """Loss, gradients, and the bytes that autograd keeps between the forward and the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)  # for the connector's dropout
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_same_loss_and_gradients_from_less_memory(text):
    model, batch = build(text)
    loss, gradients, kept = training_step(model.train(), batch)
    model.activation_checkpointing_enable()
    model.activation_checkpointing_enable()  # a second time changes nothing
    again, gradients_again, kept_again = training_step(model, batch)
    assert torch.equal(again, loss)
    assert gradients_again.keys() == gradients.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[name], gradient, atol=1e-6, rtol=1e-5)
    assert kept_again < kept / 3
    assert not any(module.training for module in model.language_model.modules())

    model.activation_checkpointing_disable()
    assert training_step(model, batch)[2] == kept


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_generation_is_not_changed(text):
    model, batch = build(text, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    prompts = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        before = model.eval()(**batch).logits
    words = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    model.activation_checkpointing_enable()
    for training in (True, False):
        assert torch.equal(model.train(training).generate(**prompts, max_new_tokens=4, do_sample=False), words)
    outputs = model(**batch, use_cache=True)  # with a gradient, but not in training
    assert outputs.cache.get_seq_length() == batch["input_ids"].shape[1]
    torch.testing.assert_close(outputs.logits, before)
    outputs.loss.backward()
