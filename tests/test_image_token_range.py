"""A processor of a model that serves a range of tokens, and vision features of several tiles."""

import pytest
import torch

from processing_evlgen import EVLGenProcessor

from .helpers import noise_images
from .test_processing import make_processor


def test_the_range_is_saved_with_the_processor(tmp_path):
    make_processor(image_token_range=[2, 9]).save_pretrained(tmp_path)
    assert EVLGenProcessor.from_pretrained(tmp_path).image_token_range == [2, 9]
    make_processor().save_pretrained(tmp_path / "plain")
    assert EVLGenProcessor.from_pretrained(tmp_path / "plain").image_token_range is None


@pytest.mark.parametrize("budget", [2, 9])
def test_a_number_in_the_range_is_allowed(budget):
    processor = make_processor(image_token_range=[2, 9])
    ids = processor(images=noise_images(1), num_image_tokens=budget)["input_ids"]
    assert (ids == processor.image_token_id).sum() == budget


@pytest.mark.attack
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_image_tokens": 1}, "`num_image_tokens` must be from 2 to 9, .* but is 1"),
        ({"num_image_tokens": [4, 10]}, r"`num_image_tokens` must be from 2 to 9, .* but is \[4, 10\]"),
    ],
)
def test_a_number_out_of_the_range_is_refused_with_the_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_processor(image_token_range=[2, 9])(images=noise_images(2), **arguments)
    make_processor()(images=noise_images(2), **arguments)  # the model checks
    with pytest.raises(ValueError, match=r"`num_video_tokens` must be from 2 to 9, .* but is 10"):
        make_processor(image_token_range=[2, 9])(videos=[noise_images(2)], num_video_tokens=10)


@pytest.mark.attack
@pytest.mark.parametrize("given", [[4], [9, 4], [0, 9], [2.5, 9], "2 9", 5])
def test_a_range_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="`image_token_range` must hold the smallest and the largest number"):
        make_processor(image_token_range=given)


@pytest.mark.attack
def test_a_default_out_of_the_range_is_refused():
    with pytest.raises(ValueError, match=r"`num_image_tokens` must be from 4 to 9, .* but is 3"):
        make_processor(image_token_range=[4, 9])


def test_vision_features_of_tiles_go_through_with_their_grids():
    processor = make_processor()
    features, grids = torch.randn(5, 17, 16), torch.tensor([[1, 2, 2], [1, 1, 1]])
    batch = processor(vision_features=features, image_grid_thw=grids, text=["a", "b"])
    assert batch["vision_features"] is features and batch["image_grid_thw"] is grids
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [3, 3]


@pytest.mark.attack
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"vision_features": torch.zeros(3, 17, 16), "image_grid_thw": torch.tensor([[1, 2, 2]])},
            r"`image_grid_thw` is \[\[1, 2, 2\]\], 4 tiles together, but `vision_features` holds 3",
        ),
        (
            {"vision_features": torch.zeros(3, 17, 16), "image_grid_thw": torch.tensor([1, 3, 1])},
            r"`image_grid_thw` must have shape \(images, 3\), but has \(3,\)",
        ),
        (
            {"images": noise_images(1), "image_grid_thw": torch.tensor([[1, 1, 1]])},
            "`image_grid_thw` is given beside `vision_features` alone",
        ),
    ],
)
def test_grids_that_do_not_fit_the_features_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_processor()(**inputs)
