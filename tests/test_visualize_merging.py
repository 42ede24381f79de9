"""examples/visualize_merging.py: the drawing shows the model's own merging."""

from itertools import product

import numpy as np
import pytest
import torch
import visualize_merging
from PIL import Image

from common.evaluation import merging_overlay
from modeling_evlgen import EVLGenForConditionalGeneration, ExplainedWord, explain

from .helpers import noise_images, save, save_animation, tiny_model, tiny_processor


@pytest.mark.parametrize("vision", ["clip", "siglip", "convnext"])
def test_groups_are_the_models(vision):
    model = tiny_model(vision)
    inputs = tiny_processor(model)(images=noise_images(1))
    soft_prompt, merging = merging_overlay.trace_merging(model, inputs, model.config.num_image_tokens)
    expected = model.get_image_features(inputs["pixel_values"])
    assert torch.equal(soft_prompt.pooler_output, expected.pooler_output)
    patches = expected.output_index[0, -merging.groups[0].size :]  # without a class token
    assert len(merging.groups) == 3 and np.array_equal(merging.groups[-1].flatten(), patches)
    assert merging.counts == model.config.connector_config.token_counts(model.config.num_vision_tokens)


def patch(drawn, row, column, side=4):
    """The pixels of one patch, without its outline."""
    size = merging_overlay.SIDE // side
    pixels = np.asarray(drawn, dtype=float)
    return pixels[row * size + 2 : (row + 1) * size, column * size + 2 : (column + 1) * size]


def test_patches_of_a_token_share_a_colour_and_a_number():
    """Wherever the patches lie. No other patch has that colour and number."""
    groups = np.arange(16).reshape(4, 4)
    groups[0, 0] = groups[3, 1] = groups[1, 3] = 10
    drawn = merging_overlay.draw_groups(Image.new("RGB", (448, 448), "white"), groups)
    patches = {place: patch(drawn, *place) for place in np.ndindex(4, 4)}
    for (place, pixels), (other, others) in product(patches.items(), repeat=2):
        same = groups[place] == groups[other]
        assert np.array_equal(pixels, others) == same
        assert (np.abs(pixels[:8, :8] - others[:8, :8]).max() > 15) == (not same)  # no number in this corner


def test_each_region_of_a_token_has_one_number_unless_the_tokens_are_many(monkeypatch):
    """A grid of numbers would hide the image."""
    written = []
    monkeypatch.setattr(
        merging_overlay.ImageDraw.ImageDraw, "text", lambda draw, *given, **_: written.append(given[:2])
    )
    white = Image.new("RGB", (448, 448), "white")
    regions = np.array([[0, 0, 1, 0], [2, 0, 1, 0], [0, 0, 1, 1], [3, 0, 0, 0]])
    merging_overlay.draw_groups(white, regions)
    assert written == [((56, 56), "0"), ((280, 56), "1"), ((392, 56), "0"), ((56, 168), "2"), ((56, 392), "3")]
    limit = merging_overlay.MAX_NUMBERED
    for count in (limit, limit + 1):
        written.clear()
        merging_overlay.draw_groups(white, np.minimum(np.arange(64), count - 1).reshape(8, 8))
        assert len(written) == (limit if count == limit else 0)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A folder with a model, two images and a video of four frames."""
    folder = tmp_path_factory.mktemp("captioner")
    model = tiny_model()
    processor = tiny_processor(model)
    save(folder, model, processor)
    for index, image in enumerate(noise_images(2)):
        image.save(folder / f"{index}.png")
    save_animation(folder / "video.webp", noise_images(4))
    return folder


def draw(captioner, *arguments):
    """Runs the script with the arguments; returns the panels of each row."""
    output = captioner / "merging.png"
    visualize_merging.main(["--model", str(captioner), *arguments, "--output", str(output)])
    drawing = np.asarray(Image.open(output))
    side, gap, title = merging_overlay.SIDE, visualize_merging.GAP, visualize_merging.TITLE
    return [
        [drawing[top : top + side, left : left + side] for left in range(0, drawing.shape[1], side + gap)]
        for top in range(title, drawing.shape[0], title + side + gap)
    ]


def test_draws_a_row_for_each_image_and_each_frame(captioner):
    images = ["--images", *(str(captioner / f"{index}.png") for index in range(2))]
    rows = draw(captioner, *images, "--videos", str(captioner / "video.webp"))
    model = EVLGenForConditionalGeneration.from_pretrained(captioner)
    processor = tiny_processor(model)
    for row, image in zip(rows, noise_images(2) + noise_images(4), strict=True):
        assert len(row) == 3 and np.array_equal(row[0], merging_overlay.resize_to_side(image))
    inputs = processor(images=noise_images(2)[1])
    _, merging = merging_overlay.trace_merging(model, inputs, model.config.num_image_tokens)
    assert np.array_equal(rows[1][2], merging_overlay.draw_groups(Image.fromarray(rows[1][0]), merging.groups[-1]))


def test_a_model_with_a_range_is_drawn_with_any_number_of_tokens(captioner, tmp_path):
    model = EVLGenForConditionalGeneration.from_pretrained(captioner)
    model.config.image_token_range = [2, 17]
    processor = tiny_processor(model)
    processor.image_token_range = [2, 17]
    save(tmp_path, model, processor)
    sources = ["--images", str(captioner / "0.png"), "--videos", str(captioner / "video.webp")]
    for row in draw(tmp_path, *sources, "--num_image_tokens", "17"):  # nothing is merged
        own = merging_overlay.draw_groups(Image.fromarray(row[0]), np.arange(1, 17).reshape(4, 4))
        assert np.array_equal(row[1], own) and np.array_equal(row[2], own)
    _, merging = merging_overlay.trace_merging(model, processor(images=noise_images(1)), 5)
    assert merging.counts[-1] == 5 and merging.groups[-1].max() == 4
    with pytest.raises(ValueError, match=r"`num_image_tokens` must be from 2 to 17.* but is .*18"):
        draw(tmp_path, *sources, "--num_image_tokens", "18")


def test_a_video_or_a_model_that_cannot_be_read_is_named(captioner, tmp_path):
    with pytest.raises(ValueError, match=r"none\.mp4"):
        draw(captioner, "--videos", "none.mp4")
    with pytest.raises(ValueError, match=r"`model`='.*nowhere' cannot be loaded"):
        draw(tmp_path / "nowhere", "--videos", "none.mp4")


def test_all_frames_of_a_video_have_the_videos_merging(captioner):
    model = EVLGenForConditionalGeneration.from_image_model(
        captioner, temporal_hidden_size=8, temporal_num_attention_heads=2
    )
    processor = tiny_processor(model)
    with torch.no_grad():
        for contextualizer in model.temporal:
            contextualizer.alpha.fill_(0.5)
    rows = visualize_merging.panels_of(model, processor, "videos", str(captioner / "video.webp"))
    assert [row[0][0] for row in rows] == [f"frame {n} of 4, {(n - 1) / 10:.1f} s, 4 x 4 patches" for n in range(1, 5)]
    pixels = processor(videos=noise_images(4))["pixel_values_videos"]
    expected = model.get_video_features(pixels).output_index[0, 1:].reshape(4, 4).numpy()
    for row, frame in zip(rows, noise_images(4), strict=True):
        image = merging_overlay.resize_to_side(frame)
        assert np.array_equal(row[0][1], image)
        assert np.array_equal(row[2][1], merging_overlay.draw_groups(image, expected))


def test_each_frame_of_a_merged_video_has_a_merging_of_its_own(captioner):
    model = EVLGenForConditionalGeneration.from_pretrained(captioner, video_mode="merge")
    inputs = tiny_processor(model)(videos=noise_images(4))
    features, places, index = merging_overlay.trace_frames(model, inputs["pixel_values_videos"], inputs["frame_times"])
    torch.testing.assert_close(features, model.get_vision_features(inputs["pixel_values_videos"]))
    assert index.shape == (4, model.config.num_vision_tokens)
    for token in range(1, model.config.num_vision_tokens):  # a token is the mean of the patches that it is drawn on
        frames, _ = (index == token).nonzero(as_tuple=True)
        assert places[0, token, 0] == pytest.approx(frames.float().mean())
    _, merging = merging_overlay.trace_merging(model, inputs, model.config.num_image_tokens, frames=[0, 3])
    assert all(groups.shape == (2, 4, 4) for groups in merging.groups)
    assert not np.array_equal(merging.of_frame(2, 0), merging.of_frame(2, 1))


def test_words_are_drawn_with_their_places(captioner):
    """Each word of the model has a cell of the strip, and an outline in its colour on its own frame alone."""
    values = torch.zeros(2, 4, 4)
    values[1, 1, 2] = 5.0
    places = [ExplainedWord("frog", 0.9, 0.9, 5.0, (values,)), ExplainedWord("the", 0.9, 0.9, 0.1, (values,))]
    white = Image.new("RGB", (merging_overlay.SIDE,) * 2, "white")
    first, second = (np.asarray(merging_overlay.draw_words(white, places, frame)) for frame in range(2))
    side = merging_overlay.SIDE
    assert (first[:side] == 255).all()
    rows, columns = (second[:side] != 255).any(axis=2).nonzero()
    assert [rows.min(), rows.max(), columns.min(), columns.max()] == pytest.approx([112, 224, 224, 336], abs=4)
    assert (first[side:] != 255).any() and np.array_equal(first[side:], second[side:])

    model = EVLGenForConditionalGeneration.from_pretrained(captioner)
    found = explain(model, tiny_processor(model), noise_images(1)[0], do_sample=False)
    output = captioner / "words.png"
    sources = ["--images", str(captioner / "0.png"), "--videos", str(captioner / "video.webp")]
    visualize_merging.main(["--model", str(captioner), *sources, "--words", "--output", str(output)])
    height = visualize_merging.TITLE + side + merging_overlay.STRIP + visualize_merging.GAP
    drawing = np.asarray(Image.open(output))
    assert drawing.shape[:2] == (5 * height - visualize_merging.GAP, side)
    expected = merging_overlay.draw_words(merging_overlay.resize_to_side(noise_images(1)[0]), found)
    panel = drawing[visualize_merging.TITLE :][: side + merging_overlay.STRIP]
    assert np.array_equal(panel, expected)
