"""Rows become batches: random draws that a resumed run repeats, and rows that cannot be used."""

import random

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from common.arguments import DataArguments
from common.data.collator import CaptionCollator, EmptyBatchError, TrainingCollator

from .helpers import noise_images, tiny_model, tiny_processor
from .training import png

CROPS = DataArguments(crop_scale=[0.1, 0.4])


def collator_of(data_args=CROPS, **settings):
    return CaptionCollator(tiny_processor(tiny_model()), data_args, training=True, **settings)


def rows_of(count=4):
    return [{"image": {"bytes": png(image), "path": None}, "caption": "a caption"} for image in noise_images(count)]


def test_persistent_workers_draw_anew_in_each_epoch():
    collator = collator_of()
    expected = []
    for epoch in range(3):
        collator.epoch = epoch
        expected.append(collator(rows_of())["pixel_values"])
    assert not torch.equal(expected[0], expected[1])
    workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"}
    loader = DataLoader(rows_of(), 4, collate_fn=collator, **workers)
    for epoch in range(3):
        collator.epoch = epoch
        (batch,) = loader
        assert torch.equal(batch["pixel_values"], expected[epoch])


def test_draws_leave_the_random_generators_alone():
    collator, drawn = collator_of(), []
    for rows in ([], rows_of()):
        torch.manual_seed(1)
        random.seed(1)
        if rows:
            collator(rows)
        drawn.append((torch.rand(1), random.random()))
    assert drawn[0] == drawn[1]


def test_a_batch_of_bad_rows_alone_is_replaced_by_good_rows():
    """The last batch of an epoch may be a single bad row; every process must take the step."""
    rows = rows_of()
    rows[0]["caption"] = rows[3]["caption"] = ""
    dataset = Dataset.from_list(rows)
    collator = collator_of(DataArguments(skip_bad_rows=True))
    batch = TrainingCollator(collator, dataset)([dataset[3]])
    assert len(batch["pixel_values"]) == 1
    assert torch.equal(batch["pixel_values"], collator([dataset[1]])["pixel_values"])
    assert len(batch["bad_rows"]) == 1  # the row of the data set's start is not listed again
    none = Dataset.from_list([rows[0], rows[3]])
    with pytest.raises(EmptyBatchError, match="None of the 2 rows"):
        TrainingCollator(collator, none)([none[0]])


def test_a_caption_that_cannot_be_encoded_is_a_bad_row_even_alone():
    rows = rows_of()
    collator = collator_of(DataArguments(skip_bad_rows=True))
    rows[3]["caption"] = f"one{collator.processor.tokenizer.eos_token} two"
    dataset = Dataset.from_list(rows)
    batch = TrainingCollator(collator, dataset)([dataset[3]])
    assert torch.equal(batch["pixel_values"], collator([dataset[0]])["pixel_values"])
    assert len(batch["bad_rows"]) == 1
    with pytest.raises(ValueError, match=r"'one.* two'"):
        collator_of(DataArguments())([dataset[3]])
