"""examples/visualize_merging.py and common/overlay.py: the groups are the model's, and the drawing shows them."""

import numpy as np
import pytest
import torch
import visualize_merging
from PIL import Image

from common import overlay
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import IMAGE_SIZE, pictures, tiny_model, tiny_processor, tiny_towers


@pytest.mark.parametrize("vision", ["clip", "siglip", "convnext"])
def test_groups_are_the_models(vision):
    model = tiny_model(vision)
    batch = tiny_processor(model)(images=pictures(2))
    layers = overlay.merged_tokens(model, batch["pixel_values"])
    expected = model.get_image_features(batch["pixel_values"]).output_index
    assert len(layers) == 2 and torch.equal(layers[-1], expected)
    counts = [int(index.max()) + 1 for index in layers]
    schedule = model.config.connector_config.merge_schedule(model.config.num_vision_tokens)
    assert counts == [model.config.num_vision_tokens - sum(schedule[: i + 1]) for i in range(2)]


def test_a_group_is_one_colour_and_has_an_outline():
    image = Image.new("RGB", (448, 448), "white")
    image.paste("black", (0, 0, 224, 448))
    drawn = overlay.draw_groups(image, np.array([[0, 1], [0, 1]]))
    assert drawn[100, 100].tolist() == [0, 0, 0] and drawn[100, 300].tolist() == [255, 255, 255]
    assert drawn[100, 224].tolist() == [89, 89, 89]  # between the groups
    assert drawn[224, 300].tolist() == [255, 255, 255]  # and not inside one
    merged = overlay.draw_groups(image, np.zeros((2, 2), dtype=int))
    assert np.unique(merged).tolist() == [128]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A folder with a model, two pictures and a clip of four frames."""
    folder = tmp_path_factory.mktemp("captioner")
    model = tiny_model()
    processor = tiny_processor(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for index, picture in enumerate(pictures(2)):
        picture.save(folder / f"{index}.png")
    first, *rest = pictures(4)
    first.save(folder / "clip.webp", save_all=True, append_images=rest, lossless=True)
    return folder


def draw(captioner, *arguments):
    """Draws what the arguments name; gives width and height in rows of about 240 pixels."""
    output = captioner / "merging.png"
    visualize_merging.main(["--model", str(captioner), *arguments, "--output", str(output)])
    width, height = Image.open(output).size
    return width, round(height / 240, 1)


def test_draws_a_row_for_each_picture_and_each_frame(captioner):
    images = ["--images", *(str(captioner / f"{index}.png") for index in range(2))]
    videos = ["--videos", str(captioner / "clip.webp")]
    width, rows = draw(captioner, *images)
    assert width > 600 and rows == pytest.approx(2, abs=0.3)
    assert draw(captioner, *videos) == (width, pytest.approx(4, abs=0.6))
    assert draw(captioner, *images, *videos) == (width, pytest.approx(6, abs=0.9))


def test_without_pictures_or_clips_there_is_nothing_to_draw(captioner, capsys):
    with pytest.raises(SystemExit):
        visualize_merging.main(["--model", str(captioner)])
    assert "at least one of --images and --videos must be given" in capsys.readouterr().err


def test_a_clip_that_cannot_be_read_is_named(captioner):
    with pytest.raises(ValueError, match=r"none\.mp4"):
        draw(captioner, "--videos", "none.mp4")


def test_other_connectors_are_refused():
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        *tiny_towers(),
        connector_config={"model_type": "evlgen_mlp", "hidden_size": 32, "intermediate_size": 64},
        image_size=IMAGE_SIZE,
        image_token_id=300,
    )
    with pytest.raises(ValueError, match="merged by a TomeFormer, but the model has a MLPConnector"):
        overlay.merged_tokens(model, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))


def test_hooks_are_gone_when_a_drawing_fails():
    model = tiny_model()
    with pytest.raises(ValueError, match="`pixel_values` must have shape"):
        overlay.merged_tokens(model, torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE))
    assert not any(layer._forward_hooks for layer in model.connector.encoder.layer)


def test_all_frames_of_a_clip_have_the_clips_merging(captioner):
    model = EVLGenForConditionalGeneration.from_image_model(
        captioner, temporal_hidden_size=8, temporal_num_attention_heads=2
    )
    processor = tiny_processor(model)
    with torch.no_grad():
        for contextualizer in model.temporal:
            contextualizer.alpha.fill_(0.5)
    rows = visualize_merging.clip_rows(model, processor, str(captioner / "clip.webp"))
    pixels = processor(videos=pictures(4))["pixel_values_videos"]
    expected = model.get_video_features(pixels).output_index[0, 1:].reshape(4, 4).numpy()
    assert [row.name for row in rows] == [f"frame {number} of 4" for number in range(1, 5)]
    for row, frame in zip(rows, pictures(4), strict=True):
        assert np.array_equal(row.groups[-1], expected)
        assert np.array_equal(row.image, overlay.resize_to_side(frame))
    alone = [model.get_image_features(frame[None]).output_index[0, 1:].reshape(4, 4).numpy() for frame in pixels[0]]
    assert not all(np.array_equal(index, expected) for index in alone)
