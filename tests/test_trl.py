"""TRL's trainers train a checkpoint with their defaults, and with the loss of our own collator."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, CohereConfig, Gemma2Config, GraniteConfig

from .helpers import TEXT_CONFIGS, TEXT_SIZES, TRAINING_TEMPLATE, noise_images, save, tiny_model, tiny_processor

trl = pytest.importorskip("trl", reason="needs the trl extra")

_SIZES = {**TEXT_SIZES, "intermediate_size": 64, "num_key_value_heads": 1}
SCALED_LOGITS = {
    "granite": GraniteConfig(**_SIZES, logits_scaling=4.0),
    "cohere": CohereConfig(**_SIZES, logit_scale=0.25),
    "gemma2": Gemma2Config(**_SIZES, head_dim=16, final_logit_softcapping=2.0),
}
ANSWERS = ["a red circle", "a blue triangle to the left of a green square"]


def checkpoint(folder, text="llama", max_tiles=1):
    model = tiny_model(text=text, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    processor = tiny_processor(model, chat=True)
    processor.chat_template = processor.chat_template.replace(processor.tokenizer.chat_template, TRAINING_TEMPLATE)
    processor.end_of_text, processor.max_tiles = "<|im_end|>", max_tiles
    save(folder, model, processor)
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def conversation(answer):
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    return [question, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def rows(kind, images=None):
    messages = [conversation(answer) for answer in ANSWERS]
    images = [[image] for image in images or noise_images(2)]
    if kind == "messages":
        return Dataset.from_dict({"messages": messages, "images": images})
    prompts, completions = zip(*((turns[:1], turns[1:]) for turns in messages), strict=True)
    return Dataset.from_dict({"prompt": list(prompts), "completion": list(completions), "images": images})


SETTINGS = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none"}
SETTINGS |= {"save_strategy": "no", "logging_steps": 1}


def sft_trainer(model, processor, dataset, folder, peft_config=None, **settings):
    args = trl.SFTConfig(output_dir=str(folder), **{**SETTINGS, **settings})
    return trl.SFTTrainer(model, args, train_dataset=dataset, processing_class=processor, peft_config=peft_config)


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def our_loss(model, processor, images=None):
    batch = processor(images=images or noise_images(2), messages=[conversation(answer) for answer in ANSWERS])
    return model(**batch).loss.item()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["messages", "prompt and completion"])
def test_sft_with_its_defaults_trains_a_checkpoint(kind, lora, tmp_path):
    model, processor = checkpoint(tmp_path / "model")
    towers = {n: p.clone() for n, p in model.named_parameters() if n.startswith(("vision_tower", "language_model"))}
    peft_config = LoraConfig(r=2, target_modules=r"language_model.*\.(q|v)_proj") if lora else None
    trainer = sft_trainer(model, processor, rows(kind), tmp_path / "out", peft_config, learning_rate=1e-2)
    losses = losses_of(trainer)
    assert losses[1] < losses[0] < 20
    assert isinstance(trainer.model, PeftModel) is lora
    if not lora:
        state = model.state_dict()
        assert all(torch.equal(state[name], tower) for name, tower in towers.items())


def logged_loss(model, processor, dataset, folder, **settings):
    trainer = sft_trainer(model, processor, dataset, folder, max_steps=1, bf16=False, **settings)
    return losses_of(trainer)[0]


@pytest.mark.parametrize("max_tiles", [1, 4])
@pytest.mark.parametrize(("text", "kind"), [("llama", "messages"), ("llama", "prompts"), ("gpt2", "messages")])
def test_the_loss_of_sft_is_that_of_our_collator(text, kind, max_tiles, tmp_path):
    model, processor = checkpoint(tmp_path / "model", text, max_tiles)
    images = [*noise_images(1, 64), *noise_images(1, 20)]  # four tiles and one
    expected = our_loss(model, processor, images)
    dataset, only = rows(kind, images), kind == "messages"
    loss = logged_loss(model, processor, dataset, tmp_path / "out", assistant_only_loss=only)
    assert loss == pytest.approx(expected, abs=1e-3)
    processor.max_tiles = 1
    assert max_tiles == 1 or abs(our_loss(model, processor, images) - expected) > 1e-2


@pytest.mark.parametrize("text", SCALED_LOGITS)
def test_the_loss_of_sft_follows_a_language_model_that_scales_or_caps_its_logits(text, tmp_path, monkeypatch):
    """TRL multiplies hidden states by the head itself. Scale and cap come from the language model's configuration."""
    monkeypatch.setitem(TEXT_CONFIGS, text, SCALED_LOGITS[text])
    model, processor = checkpoint(tmp_path / "model", text)
    expected = our_loss(model, processor)
    assert logged_loss(model, processor, rows("prompts"), tmp_path / "out") == pytest.approx(expected, abs=1e-3)
    batch = processor(images=noise_images(2), messages=[conversation(answer) for answer in ANSWERS])
    hidden = model.base_model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
    logits, targets = model.get_output_embeddings()(hidden[:, :-1]), batch["labels"][:, 1:]
    unscaled = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert abs(unscaled - expected) > 0.1  # of the head's plain product


def prompts():
    return {"prompt": [conversation(answer)[:1] for answer in ANSWERS], "images": [[i] for i in noise_images(2)]}


def test_dpo_trains_a_checkpoint(tmp_path):
    model, processor = checkpoint(tmp_path / "model")
    answers = [conversation(answer)[1:] for answer in ANSWERS]
    dataset = Dataset.from_dict({**prompts(), "chosen": answers, "rejected": answers[::-1]})
    args = trl.DPOConfig(output_dir=str(tmp_path / "out"), **SETTINGS, bf16=False, learning_rate=1e-3)
    trainer = trl.DPOTrainer(model, args=args, train_dataset=dataset, processing_class=processor)
    losses = losses_of(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3) and losses[1] < losses[0]


def test_grpo_trains_a_checkpoint(tmp_path):
    model, processor = checkpoint(tmp_path / "model")
    before = model.language_projection.weight.clone()
    settings = {**SETTINGS, "bf16": False, "num_generations": 2, "max_completion_length": 8}
    args = trl.GRPOConfig(output_dir=str(tmp_path / "out"), **settings)

    def reward(completions, **kwargs):
        return [float(len(str(completion))) for completion in completions]

    dataset = Dataset.from_dict(prompts())
    trl.GRPOTrainer(model, reward, args=args, train_dataset=dataset, processing_class=processor).train()
    assert not torch.equal(model.language_projection.weight, before)
