"""Training on tiles and on a range of image tokens: what each batch draws, and how crops keep their resolution."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from common.arguments import DataArguments, ModelArguments, ProcessorArguments
from common.data.collator import CaptionCollator, RandomCrop
from common.data.streams import EPOCH
from common.models import build_model

from .helpers import noise_images, save_towers
from .test_processing import make_processor
from .training import LAYERS

LOW, HIGH = 4, 16
SIZES = {**LAYERS, "merge_r": 3}


def processor_of(image_token_range=(LOW, HIGH), max_tiles=1, **kwargs):
    kwargs |= {"num_image_tokens": image_token_range[0], "image_token_range": image_token_range}
    return make_processor(max_tiles=max_tiles, **kwargs)


def rows_of(count):
    images = noise_images(4)
    return [{"image": images[index % 4], "caption": f"caption {index}"} for index in range(count)]


def budgets_of(collator, rows):
    """The number of image tokens of each row of one batch."""
    ids = collator(rows)["input_ids"]
    return (ids == collator.processor.image_token_id).sum(dim=1).tolist()


@pytest.mark.parametrize("bounds", [(LOW, HIGH), (5, 5)])
def test_a_batch_draws_log_uniformly_from_the_range(bounds):
    collator = CaptionCollator(processor_of(bounds), DataArguments(), training=True)
    low, high = bounds
    counts = Counter(collator.draw_budget([row]) for row in rows_of(900))
    assert set(counts) == set(range(low, high + 1))
    for budget, count in counts.items():
        expected = 900 * math.log(1 + 1 / budget) / math.log((high + 1) / low)
        assert abs(count - expected) <= 4 * math.sqrt(expected)


def test_all_images_of_a_batch_have_the_number_that_was_drawn():
    collator, seen = CaptionCollator(processor_of(), DataArguments(), training=True), set()
    for first in range(0, 60, 3):
        rows = rows_of(60)[first : first + 3]
        (budget,) = set(budgets_of(collator, rows))
        assert collator(rows)["image_budgets"] == [budget] * 3  # for compiled models
        seen.add(budget)
    assert len(seen) > 2 and seen <= set(range(LOW, HIGH + 1))


def test_draws_depend_on_seed_epoch_and_texts_alone():
    rows = rows_of(60)

    def draw(epoch=0, seed=0, rows=rows):
        collator = CaptionCollator(processor_of(), DataArguments(), training=True, seed=seed)
        collator.epoch = epoch
        return [collator.draw_budget([row]) for row in rows]

    assert draw() == draw()
    assert draw() != draw(epoch=1) and draw() != draw(seed=1)
    assert draw() == draw(rows=[{"caption": row["caption"], "vision_features": None} for row in rows])  # of a cache
    assert draw(epoch=1) == draw(rows=[{**row, EPOCH: 1} for row in rows])  # of a stream


def test_held_out_batches_have_the_processors_own_number():
    processor = processor_of()
    collator = CaptionCollator(processor, DataArguments(), training=False)
    assert budgets_of(collator, rows_of(3)) == [processor.num_image_tokens] * 3
    ids = collator.prompts(rows_of(3))["input_ids"]
    assert (ids == processor.image_token_id).sum() == 3 * processor.num_image_tokens


def test_a_text_that_is_too_long_is_skipped_whatever_the_batch_draws():
    """The rows of a batch are tried one by one with the number that the batch drew."""
    processor = processor_of()
    data_args = DataArguments(skip_bad_rows=True)
    rows = [{**row, "caption": "x" * 128} if index % 2 else row for index, row in enumerate(rows_of(40))]
    for start in range(0, 40, 2):
        collator = CaptionCollator(processor, data_args, training=True)
        assert len(budgets_of(collator, rows[start : start + 2])) == 1 and len(collator.bad_rows) == 1


def large_rows(height=64, width=96, count=4):
    pixels = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return [{"image": Image.fromarray(image), "caption": f"caption {i}"} for i, image in enumerate(pixels)]


def test_crops_of_large_images_keep_their_resolution_and_their_tiles():
    data_args = DataArguments(crop_scale=[0.5, 1.0], horizontal_flip=True)
    collator = CaptionCollator(processor_of(max_tiles=6), data_args, training=True)
    batch = collator(large_rows())
    assert (batch["image_grid_thw"].prod(dim=1) > 1).all()
    crops = [collator.read(row) for row in large_rows()]
    assert len({crop.size for crop in crops}) > 1
    for crop, row in zip(crops, large_rows(), strict=True):
        share = crop.width * crop.height / (96 * 64)
        assert 0.45 < share < 1.02 and crop.width <= 96 and crop.height <= 64
        whole = {tuple(pixel) for line in np.asarray(row["image"]) for pixel in line}
        assert {tuple(pixel) for line in np.asarray(crop) for pixel in line} <= whole  # nothing was resized


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 1), (3, 50)])
def test_crops_fit_images_of_any_shape(size):
    crop = pickle.loads(pickle.dumps(RandomCrop((0.05, 1.0))))  # as a worker gets it
    image = Image.new("RGB", size)
    for _ in range(50):
        cropped = crop(image)
        assert 1 <= cropped.width <= size[0] and 1 <= cropped.height <= size[1]
    assert RandomCrop((1.0, 1.0))(image).size == size


def test_crops_for_one_tile_are_the_papers():
    collator = CaptionCollator(processor_of(max_tiles=1), DataArguments(crop_scale=[0.5, 1.0]), training=True)
    assert collator.read(large_rows()[0]).size == (32, 32)


def test_images_of_a_conversation_may_differ_in_size():
    data_args = DataArguments(messages_column="messages", crop_scale=[0.5, 1.0])
    collator = CaptionCollator(processor_of(chat=True), data_args, training=True)
    turns = [{"role": "user", "content": [{"type": "image"}] * 2}, {"role": "assistant", "content": "answer"}]
    row = {"image": [noise_images(1, 40)[0], noise_images(1, 60)[0]], "messages": turns}
    assert [image.size for image in collator.read(row)] == [(32, 32)] * 2


def build(tmp_path, connector="tomeformer", fields=SIZES, vision="clip", **arguments):
    towers = save_towers(tmp_path, vision)
    model_args = ModelArguments(**towers, connector=connector, connector_config=fields)
    return build_model(model_args, ProcessorArguments(**arguments))


def test_a_new_model_and_its_processor_have_the_tiles_and_the_range(tmp_path):
    model, processor = build(tmp_path, max_tiles=4, image_token_range=[4, 17])
    assert model.config.image_token_range == processor.image_token_range == [4, 17]
    assert processor.max_tiles == 4 and processor.num_image_tokens == model.config.num_image_tokens == 11
    model, processor = build(tmp_path, image_token_range=[4, 9], num_image_tokens=6)  # 11 by `merge_r`
    assert processor.num_image_tokens == model.config.num_image_tokens == 6
    model, processor = build(tmp_path)
    assert model.config.image_token_range is processor.image_token_range is None and processor.max_tiles == 1


MEANS = {"connector": "mlp", "fields": {"hidden_size": 32, "pool_size": 3}, "vision": "siglip"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_token_range": [4, 18]}, r"`image_token_range` is \[4, 18\]: .* must be from 2 to 17"),
        ({"image_token_range": [4, 9], **MEANS}, "must be a square, but is 5"),
        ({"num_image_tokens": 9}, "`num_image_tokens` needs `image_token_range`"),
        ({"num_image_tokens": 3, "image_token_range": [4, 9]}, "`num_image_tokens` must be from 4 to 9, .* but is 3"),
        ({"max_tiles": 2, "connector": "mlp", "fields": {"hidden_size": 32}}, "no image of several tiles: .*pool_"),
    ],
)
def test_numbers_of_tokens_and_tiles_that_cannot_work_are_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **given)
