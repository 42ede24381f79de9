"""Rows become batches: random draws that a resumed run repeats, and rows that cannot be used."""

import io
import logging
import random

import pytest
import torch
from datasets import Dataset
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from torch.utils.data import DataLoader

from common.arguments import DataArguments
from common.data.collator import CaptionCollator, EmptyBatchError, TrainingCollator, checksum
from common.data.streams import tolerant_reading

from .helpers import noise_images, tiny_model, tiny_processor

CROPS = DataArguments(crop_scale=[0.1, 0.4])


def collator_of(data_args=CROPS, **settings):
    return CaptionCollator(tiny_processor(tiny_model()), data_args, training=True, **settings)


def rows_of(count=4):
    rows = []
    for image in noise_images(count):
        image.save(file := io.BytesIO(), format="PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "caption": "a caption"})
    return rows


class Unprintable(bytes):
    def __repr__(self):
        raise AssertionError("`repr` of an encoded image takes milliseconds")


def test_draws_do_not_print_the_encoded_image():
    (row,) = rows_of(1)
    row["image"]["bytes"] = Unprintable(row["image"]["bytes"])
    collator_of()([row])
    other = {**row, "image": {**row["image"], "bytes": row["image"]["bytes"][:-1] + b"x"}}
    assert checksum(row) != checksum(other)


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
    collator, rows = collator_of(), rows_of()
    torch.manual_seed(1)
    random.seed(1)
    expected = torch.rand(1), random.random()
    torch.manual_seed(1)
    random.seed(1)
    collator(rows)
    assert (torch.rand(1), random.random()) == expected


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
    with pytest.raises(EmptyBatchError, match="None of the 2 rows of the training split can be used"):
        TrainingCollator(collator, none)([none[0]])


def test_a_caption_that_cannot_be_encoded_is_a_bad_row_even_alone():
    rows = rows_of()
    collator = collator_of(DataArguments(skip_bad_rows=True))
    rows[3]["caption"] = f"one{collator.processor.tokenizer.eos_token} two"
    dataset = Dataset.from_list(rows)
    batch = TrainingCollator(collator, dataset)([dataset[3]])
    assert torch.equal(batch["pixel_values"], collator([dataset[0]])["pixel_values"])
    assert len(batch["bad_rows"]) == 1
    with pytest.raises(ValueError, match=r"the row with the caption 'one.* two'.* goes on without it"):
        collator_of(DataArguments())([dataset[3]])


def test_an_image_with_more_pixels_than_allowed_is_a_bad_row():
    rows = rows_of(2)
    with pytest.raises(ValueError, match=r"has 40 x 40 pixels, more than `max_pixels`=1000 allows"):
        collator_of(DataArguments(max_pixels=1000))(rows)
    assert len(collator_of(DataArguments(max_pixels=1600))(rows)["pixel_values"]) == 2


def test_reading_leaves_datasets_as_it_was():
    before, filters = WebDataset.DECODERS, list(logging.getLogger("datasets.iterable_dataset").filters)
    with pytest.raises(KeyboardInterrupt), tolerant_reading():
        assert WebDataset.DECODERS["json"](b"{") is None
        raise KeyboardInterrupt
    assert WebDataset.DECODERS is before
    assert logging.getLogger("datasets.iterable_dataset").filters == filters
