"""The answers to questions in docs/your_own_captioner.md are what the code does."""

import re

import pytest
import torch

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
