"""The answers to questions in docs/your_own_captioner.md are what the code does."""

import re

import pytest
import torch
from transformers import Trainer, TrainingArguments

from .helpers import ROOT, noise_images, tiny_model, tiny_processor

PAGE = (ROOT / "docs" / "your_own_captioner.md").read_text(encoding="utf-8")


@pytest.fixture
def model():
    return tiny_model().train()


@pytest.fixture
def processor(model):
    return tiny_processor(model, chat=True)


def batch_of(processor):
    return dict(processor(images=noise_images(2), text=["what is it?"] * 2, suffix=["a cat", "a dog"]))


def test_the_message_about_placeholders_is_the_one_that_is_explained(model, processor):
    batch = batch_of(processor)
    first = (batch["input_ids"][0] == processor.image_token_id).nonzero()[0]
    batch["input_ids"][0, first] = 5
    with pytest.raises(ValueError, match=re.escape(re.search(r'\*\*"(`input_ids` holds.*)"\*\*', PAGE)[1])):
        model(**batch)
    with pytest.raises(ValueError, match="holds 1 <image> placeholders, but `images` holds 2"):
        processor(images=noise_images(2), text="<image>what is it?")
    with pytest.raises(ValueError, match="would cut placeholders"):
        processor(images=noise_images(1), text="<image>what is it?", truncation=True, max_length=5)


def test_the_loss_is_nan_where_no_token_is_a_target(model, processor):
    batch = batch_of(processor)
    assert model(**batch).loss.isfinite()
    assert model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}).loss.isnan()


def test_a_connector_that_is_frozen_stays_as_it_is(model, processor, tmp_path):
    assert not model.vision_tower.training and not model.language_model.training and model.connector.training
    model.connector.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{name: tensor[0] for name, tensor in batch_of(processor).items()}] * 4
    args = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=0.1, use_cpu=True, report_to="none")
    Trainer(model, args, train_dataset=rows).train()
    changed = {
        name.split(".")[0] for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"ln_vision", "vision_projection", "language_projection"}
