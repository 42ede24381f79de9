"""examples/visualize_merging.py: the groups are those of the model, and the picture shows them."""

import numpy as np
import pytest
import torch
import visualize_merging
from PIL import Image

from .helpers import pictures, tiny_model, tiny_processor


@pytest.mark.parametrize("vision", ["clip", "siglip", "convnext"])
def test_groups_are_the_models(vision):
    model = tiny_model(vision)
    batch = tiny_processor(model)(images=pictures(2))
    layers = visualize_merging.merged_tokens(model, batch["pixel_values"])
    expected = model.get_image_features(batch["pixel_values"]).output_index
    assert len(layers) == 2 and torch.equal(layers[-1], expected)
    counts = [int(index.max()) + 1 for index in layers]
    schedule = model.config.connector_config.merge_schedule(model.config.num_vision_tokens)
    assert counts == [model.config.num_vision_tokens - sum(schedule[: i + 1]) for i in range(2)]


def test_a_group_is_one_colour_and_has_an_outline():
    image = Image.new("RGB", (448, 448), "white")
    image.paste("black", (0, 0, 224, 448))
    drawn = visualize_merging.draw_groups(image, np.array([[0, 1], [0, 1]]))
    assert drawn[100, 100].tolist() == [0, 0, 0] and drawn[100, 300].tolist() == [255, 255, 255]
    assert drawn[100, 224].tolist() == [89, 89, 89]  # between the groups
    assert drawn[224, 300].tolist() == [255, 255, 255]  # and not inside one
    merged = visualize_merging.draw_groups(image, np.zeros((2, 2), dtype=int))
    assert np.unique(merged).tolist() == [128]


def test_draws_a_row_for_each_picture(tmp_path):
    model = tiny_model()
    processor = tiny_processor(model)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    files = [str(tmp_path / f"{index}.png") for index in range(2)]
    for picture, file in zip(pictures(2), files, strict=True):
        picture.save(file)
    output = tmp_path / "merging.png"
    visualize_merging.main(["--model", str(tmp_path / "model"), "--images", *files, "--output", str(output)])
    width, height = Image.open(output).size
    assert width > 600 and height > 450
