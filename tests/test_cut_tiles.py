"""The processor cuts large images into tiles, and gives each image the requested number of tokens."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import choose_tile_grid, cut_tiles, tile_size
from processing_evlgen.pipeline_evlgen import EVLGenImageToTextPipeline

from .helpers import IMAGE_SIZE, noise_images, tiny_model, tiny_processor
from .test_processing import make_processor

TILE = (IMAGE_SIZE, IMAGE_SIZE)


def image(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("height", "width", "max_tiles", "grid"),
    [
        (32, 32, 9, (1, 1)),
        (20, 10, 9, (1, 1)),  # a small image is not enlarged to more tiles
        (64, 64, 9, (2, 2)),
        (64, 64, 3, (1, 1)),  # other grids would keep no more pixels
        (32, 96, 4, (1, 3)),
        (1000, 1000, 1, (1, 1)),
        (100, 10_000, 9, (1, 9)),
    ],
)
def test_a_grid_fits_the_shape_of_the_image(height, width, max_tiles, grid):
    assert choose_tile_grid(height, width, TILE, max_tiles) == grid


@pytest.mark.parametrize("kind", ["image", "array", "tensor", "channels first", "alpha", "alpha first"])
def test_tiles_are_the_parts_of_an_image_or_an_array_row_by_row(kind):
    pixels = np.asarray(image(64, 96))
    given = {"image": image(64, 96), "tensor": torch.tensor(pixels)}.get(kind, pixels)
    if kind.startswith("alpha"):
        given = np.concatenate([given, np.full_like(given[..., :1], 255)], axis=-1)
    if kind.endswith("first"):
        given = given.transpose(2, 0, 1)
    tiles, grid = cut_tiles(given, TILE, max_tiles=6)
    assert grid == (2, 3)
    for tile, (row, column) in zip(tiles, np.ndindex(grid), strict=True):
        assert np.array_equal(np.asarray(tile), pixels[row * 32 :, column * 32 :][:32, :32])
    if kind == "alpha":
        tiles, _ = cut_tiles(np.zeros_like(given), TILE, max_tiles=6)
        assert np.asarray(tiles[0]).min() == 255  # what is transparent is white, as in an image
    with pytest.raises(ValueError, match="an array of several tiles must be uint8, but is float32"):
        cut_tiles(pixels.astype(np.float32), TILE, max_tiles=6)


def test_an_image_of_one_tile_is_prepared_as_without_tiles():
    processor = make_processor()
    images = [image(20, 30), image(32, 32)]
    with_tiles, without = processor(images=images, max_tiles=4), processor(images=images)
    assert with_tiles.pop("image_grid_thw").tolist() == [[1, 1, 1]] * 2
    assert with_tiles.keys() == without.keys()
    assert torch.equal(with_tiles["pixel_values"], without["pixel_values"])


def test_tiles_of_all_images_come_in_one_tensor_with_the_grids():
    processor = make_processor()
    batch = processor(images=[image(64, 32), image(16, 16), image(64, 64)], max_tiles=4)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 1], [1, 1, 1], [1, 2, 2]]
    assert batch["pixel_values"].shape == (7, 3, 32, 32)
    assert (batch["input_ids"] == processor.image_token_id).sum() == 9  # as many as without tiles
    assert batch["image_grid_thw"].dtype == torch.int64


def test_tiles_and_ranges_are_saved_and_a_loaded_processor_may_be_given_another_number_of_tokens(tmp_path):
    make_processor(max_tiles=4, image_token_range=[2, 9]).save_pretrained(tmp_path)
    processor = EVLGenProcessor.from_pretrained(tmp_path)
    assert processor.max_tiles == 4 and processor.image_token_range == [2, 9]
    assert processor(images=image(64, 64))["pixel_values"].shape[0] == 4
    assert processor(images=image(64, 64), max_tiles=1)["pixel_values"].shape[0] == 1
    processor = EVLGenProcessor.from_pretrained(tmp_path, num_image_tokens=5)  # as vLLM's `mm_processor_kwargs`
    assert (processor(images=image(16, 16))["input_ids"] == processor.image_token_id).sum() == 5


def test_each_image_has_as_many_placeholders_as_requested():
    processor = make_processor(bos=True)
    batch = processor(images=noise_images(3), text=["<image>a <image>", "<image>"], num_image_tokens=[1, 4, 2])
    counts = (batch["input_ids"] == processor.image_token_id).sum(dim=1)
    assert counts.tolist() == [5, 2] and batch["image_budgets"].tolist() == [1, 4, 2]
    same = processor(images=noise_images(2), num_image_tokens=4)
    assert (same["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [4, 4]
    assert same["image_budgets"].tolist() == [4, 4]
    assert "image_budgets" not in processor(images=noise_images(2), num_image_tokens=processor.num_image_tokens)


def test_vllm_is_refused_numbers_of_tokens_that_the_model_does_not_make():
    """An error in the model would end vLLM's engine."""
    processor = make_processor()
    vllm = {"images": noise_images(1), "text": "<image>", "return_text_replacement_offsets": True}
    assert [int(number) for number in processor(**vllm)["image_budgets"]] == [processor.num_image_tokens]
    with pytest.raises(ValueError, match="`num_image_tokens` must be 3"):
        processor(**vllm, num_image_tokens=4)


@pytest.mark.parametrize("given", ["auto", 0])
def test_a_bad_number_of_tokens_is_refused_without_an_image_too(given):
    processor = make_processor()
    for use in (
        lambda: processor(text="a", num_image_tokens=given),
        lambda: processor(videos=[noise_images(2)], num_image_tokens=given),
        lambda: processor._get_num_multimodal_tokens([(64, 64)], num_image_tokens=given),  # vLLM calls it first
    ):
        with pytest.raises(ValueError, match=f"`num_image_tokens` must be .* but is '?{given}"):
            use()
    with pytest.raises(ValueError, match=f"`max_tiles` must be .* but is '?{given}"):
        processor._get_num_multimodal_tokens([(64, 64)], max_tiles=given)


def test_videos_take_budgets():
    processor = make_processor()
    batch = processor(videos=[noise_images(2), noise_images(2)], num_image_tokens=[2, 5])
    assert (batch["input_ids"] == processor.video_token_id).sum(dim=1).tolist() == [2, 5]
    assert batch["video_budgets"].tolist() == [2, 5]
    image_and_video = {"images": noise_images(1), "videos": [noise_images(2)], "text": ["<video>", "<image>"]}
    for given, (of_image, of_video) in ((4, (4, 4)), ([3, 5], (3, 5))):  # first the image's, then the video's
        ids = processor(**image_and_video, num_image_tokens=given, max_tiles=4)["input_ids"]
        assert (ids == processor.image_token_id).sum() == of_image
        assert (ids == processor.video_token_id).sum() == of_video


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_image_tokens": [3, -1]}, r"`num_image_tokens` must .* \[3, -1\]"),
        ({"num_image_tokens": [3]}, "`num_image_tokens` holds 1 numbers, but there are 2"),
        ({"max_tiles": 101}, "`max_tiles` must .* 101"),
        ({"max_tiles": 4, "size": {"height": 64, "width": 64}}, "`size` cannot be given with `max_tiles`"),
        ({"num_video_tokens": 4}, "`num_video_tokens` is gone"),
    ],
)
def test_bad_budgets_and_tiles_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_processor()(images=noise_images(2), **arguments)


@pytest.mark.parametrize("given", [1, [4, 10]])
def test_a_number_out_of_the_range_is_refused_with_the_range(given):
    processor = make_processor(image_token_range=[2, 9])
    for media in ({"images": noise_images(2)}, {"videos": [noise_images(2)] * 2}):
        with pytest.raises(ValueError, match=f"`num_image_tokens` must be from 2 to 9, .* {re.escape(str(given))}"):
            processor(**media, num_image_tokens=given)
    make_processor()(images=noise_images(2), num_image_tokens=given)  # the model checks
    ids = processor(images=noise_images(2), num_image_tokens=[2, 9])["input_ids"]
    assert (ids == processor.image_token_id).sum() == 11


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(("image_token_range", given) for given in ([4], [9, 4], [0, 9], "2 9")),
        *(("num_image_tokens", given) for given in (None, 0, 1.5)),
        ("max_tiles", 0),
    ],
)
def test_the_constructor_refuses_bad_numbers(name, given):
    with pytest.raises(ValueError, match=f"`{name}` must .*{re.escape(str(given))}"):
        make_processor(**{name: given})
    with pytest.raises(ValueError, match=r"`num_image_tokens` must be from 4 to 9, .* 3"):
        make_processor(image_token_range=[4, 9])


def test_vision_features_of_tiles_go_through_with_their_grids():
    processor = make_processor()
    features, grids = torch.randn(5, 17, 16), torch.tensor([[1, 2, 2], [1, 1, 1]])
    batch = processor(vision_features=features, image_grid_thw=grids, text=["a", "b"])
    assert batch["vision_features"] is features and batch["image_grid_thw"] is grids
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [3, 3]
    with pytest.raises(ValueError, match="`image_grid_thw` is for `vision_features` alone"):
        processor(images=noise_images(1), image_grid_thw=grids)


def test_tiles_have_the_size_of_the_image_processors_output():
    assert tile_size(CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 40, "width": 30})) == (40, 30)
    assert tile_size(SiglipImageProcessor(size={"height": 64, "width": 48})) == (64, 48)
    with pytest.raises(ValueError, match="`max_tiles` needs an image processor with a fixed height and width"):
        tile_size(CLIPImageProcessor(size={"shortest_edge": 40}, do_center_crop=False))
    for larger in ({"shortest_edge": 40}, {"height": 40, "width": 40}):  # as DINOv2's
        with pytest.raises(ValueError, match="crops nothing from a tile, but it resizes to"):
            tile_size(CLIPImageProcessor(size=larger, crop_size={"height": 30, "width": 30}))


def test_a_pipeline_makes_batches_of_images_of_any_tiles():
    model = tiny_model()
    model.config.image_token_range = [2, 17]
    processor = tiny_processor(model)
    captioner = EVLGenImageToTextPipeline(model=model, processor=processor)
    images, settings = [image(64, 32), image(16, 16), image(64, 64)], {"max_new_tokens": 4, "min_new_tokens": 4}
    tiles = {"max_tiles": 4, "num_image_tokens": 6}
    together = captioner(images, batch_size=3, **tiles, **settings)
    assert together == [captioner(one, **tiles, **settings) for one in images]
    words = model.generate(**processor(images=images, **tiles), **settings)[:, -4:]
    expected = processor.batch_decode(words, skip_special_tokens=True)
    assert [texts[0]["generated_text"] for texts in together] == [text.strip() for text in expected]
