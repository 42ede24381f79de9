"""examples/visualize_merging.py: the drawing shows the model's own merging."""

import numpy as np
import pytest
import torch
import visualize_merging
from finetune_lora import LoraArguments, add_lora
from PIL import Image

from common.evaluation import merging_overlay
from modeling_evlgen import EVLGenForConditionalGeneration

from .helpers import IMAGE_SIZE, noise_images, tiny_model, tiny_processor, tiny_towers


@pytest.mark.parametrize("vision", ["clip", "siglip", "convnext"])
def test_groups_are_the_models(vision):
    model = tiny_model(vision)
    batch = tiny_processor(model)(images=noise_images(2))
    layers = merging_overlay.merged_tokens(model, batch["pixel_values"])
    expected = model.get_image_features(batch["pixel_values"]).output_index
    assert len(layers) == 2 and torch.equal(layers[-1], expected)
    counts = [int(index.max()) + 1 for index in layers]
    assert counts == model.config.connector_config.token_counts(model.config.num_vision_tokens)[1:]


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
    for place, pixels in patches.items():
        corner = pixels[:8, :8]  # no number there
        for other, others in patches.items():
            same = groups[place] == groups[other]
            assert np.array_equal(pixels, others) == same
            assert (np.abs(corner - others[:8, :8]).max() > 15) == (not same)


def test_the_image_stays_visible_and_tokens_have_outlines():
    image = Image.new("RGB", (448, 448), "white")
    image.paste("black", (0, 0, 224, 448))
    merged = np.asarray(merging_overlay.draw_groups(image, np.zeros((2, 2), dtype=int)), dtype=int)
    assert np.all(merged[400, 100] + 100 < merged[400, 300]) and np.array_equal(merged[400, 224], merged[400, 300])
    drawn = np.asarray(merging_overlay.draw_groups(Image.new("RGB", (448, 448), "white"), np.array([[0, 1], [0, 1]])))
    assert drawn[400, 224].max() < 60 and np.array_equal(drawn[224, 300], drawn[230, 300])


def test_numbers_are_as_large_as_there_is_room():
    """At the width of a page (220 pixels for 14 patches) the numbers fill their patches and stay within them."""
    groups = np.arange(196).reshape(14, 14) % 98
    drawn = merging_overlay.draw_groups(Image.new("RGB", (448, 448), "white"), groups).convert("L")
    written = np.asarray(drawn) < 30
    for row, column in np.ndindex(14, 14):
        rows, columns = np.nonzero(patch(written, row, column, side=14))
        assert np.ptp(rows) >= 14 and rows.max() <= 27 and columns.min() >= 1 and columns.max() <= 28


def test_a_merged_token_keeps_its_colour():
    """It has the colour of its first patch, from layer to layer."""
    image = Image.new("RGB", (448, 448), "white")
    before, after = (
        patch(merging_overlay.draw_groups(image, groups), 0, 0, 2)
        for groups in (np.eye(2, dtype=int), np.zeros((2, 2), dtype=int))
    )
    assert np.array_equal(before[:8, :8], after[:8, :8])


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """A folder with a model, two images and a video of four frames."""
    folder = tmp_path_factory.mktemp("captioner")
    model = tiny_model()
    processor = tiny_processor(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for index, image in enumerate(noise_images(2)):
        image.save(folder / f"{index}.png")
    first, *rest = noise_images(4)
    first.save(folder / "video.webp", save_all=True, append_images=rest, lossless=True)
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
    layers = merging_overlay.merged_tokens(model, processor(images=noise_images(2)[1])["pixel_values"])
    expected = merging_overlay.draw_groups(
        merging_overlay.resize_to_side(noise_images(2)[1]), merging_overlay.patch_groups(model, layers)[-1]
    )
    assert np.array_equal(rows[1][2], expected)


def test_a_model_with_a_range_is_drawn_with_any_number_of_tokens(captioner, tmp_path):
    model = EVLGenForConditionalGeneration.from_pretrained(captioner)
    model.config.image_token_range = [2, 17]
    model.save_pretrained(tmp_path)
    processor = tiny_processor(model)
    processor.image_token_range = [2, 17]
    processor.save_pretrained(tmp_path)
    sources = ["--images", str(captioner / "0.png"), "--videos", str(captioner / "video.webp")]
    for row in draw(tmp_path, *sources, "--num_image_tokens", "17"):  # nothing is merged
        own = merging_overlay.draw_groups(Image.fromarray(row[0]), np.arange(1, 17).reshape(4, 4))
        assert np.array_equal(row[1], own) and np.array_equal(row[2], own)
    processor.num_image_tokens = 5
    row = visualize_merging.image_row(model, processor, str(captioner / "0.png"))
    assert row.counts[-1] == 5 and row.groups[-1].max() == 4
    with pytest.raises(
        ValueError, match="`num_image_tokens` must be from 2 to 17, the `image_token_range`, but is 18"
    ):
        draw(tmp_path, *sources, "--num_image_tokens", "18")


def test_without_images_or_videos_there_is_nothing_to_draw(captioner, capsys):
    with pytest.raises(SystemExit):
        visualize_merging.main(["--model", str(captioner)])
    assert "at least one of --images and --videos must be given" in capsys.readouterr().err


def test_a_video_or_a_model_that_cannot_be_read_is_named(captioner, tmp_path):
    with pytest.raises(ValueError, match=r"none\.mp4"):
        draw(captioner, "--videos", "none.mp4")
    with pytest.raises(ValueError, match=r"`model`='.*nowhere' cannot be loaded"):
        draw(tmp_path / "nowhere", "--videos", "none.mp4")


def test_other_connectors_are_refused():
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        *tiny_towers(),
        connector_config={"model_type": "evlgen_mlp", "hidden_size": 32, "intermediate_size": 64},
        image_size=IMAGE_SIZE,
        image_token_id=300,
    )
    with pytest.raises(ValueError, match="`model_type` is 'evlgen_mlp', and it neither merges nor chooses"):
        merging_overlay.merged_tokens(model, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))


def test_the_tokens_that_queries_attend_to_are_shown():
    """Each chosen patch has a number of its own, and all others have the mean's."""
    fields = {"model_type": "evlgen_qformer", "num_hidden_layers": 1, "num_attention_heads": 4}
    fields |= {"hidden_size": 32, "intermediate_size": 64, "num_query_tokens": 5, "num_distinctive_tokens": 4}
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        *tiny_towers(), connector_config=fields, image_size=IMAGE_SIZE, image_token_id=300
    )
    layers = merging_overlay.merged_tokens(model, torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert merging_overlay.layer_names(model) == ["choice"] and merging_overlay.token_counts(layers) == [6]
    (groups,) = merging_overlay.patch_groups(model, layers)
    assert sorted(groups.flatten().tolist()) == [1] * 12 + [2, 3, 4, 5]  # 0 is the class token


def test_an_adapters_merging_is_drawn(captioner, tmp_path):
    adapted = add_lora(EVLGenForConditionalGeneration.from_pretrained(captioner), LoraArguments(lora="both"))
    adapted.save_pretrained(tmp_path)
    tiny_processor(adapted.base_model.model).save_pretrained(tmp_path)
    output = tmp_path / "merging.png"
    visualize_merging.main(["--model", str(tmp_path), "--images", str(captioner / "0.png"), "--output", str(output)])
    assert Image.open(output).width == 3 * merging_overlay.SIDE + 2 * visualize_merging.GAP


def test_hooks_are_gone_when_a_drawing_fails():
    model = tiny_model()
    with pytest.raises(ValueError, match="`pixel_values` must have shape"):
        merging_overlay.merged_tokens(model, torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE))
    assert not any(layer._forward_hooks for layer in model.connector.encoder.layer)


def test_all_frames_of_a_video_have_the_videos_merging(captioner):
    model = EVLGenForConditionalGeneration.from_image_model(
        captioner, temporal_hidden_size=8, temporal_num_attention_heads=2
    )
    processor = tiny_processor(model)
    with torch.no_grad():
        for contextualizer in model.temporal:
            contextualizer.alpha.fill_(0.5)
    rows = visualize_merging.video_rows(model, processor, str(captioner / "video.webp"))
    pixels = processor(videos=noise_images(4))["pixel_values_videos"]
    expected = model.get_video_features(pixels).output_index[0, 1:].reshape(4, 4).numpy()
    assert [row.name for row in rows] == [f"frame {number} of 4, {(number - 1) / 10:.1f} s" for number in range(1, 5)]
    for row, frame in zip(rows, noise_images(4), strict=True):
        assert np.array_equal(row.groups[-1], expected)
        assert np.array_equal(row.image, merging_overlay.resize_to_side(frame))
    alone = [model.get_image_features(frame[None]).output_index[0, 1:].reshape(4, 4).numpy() for frame in pixels[0]]
    assert not all(np.array_equal(index, expected) for index in alone)


def test_each_frame_of_a_merged_video_has_a_merging_of_its_own(captioner):
    model = EVLGenForConditionalGeneration.from_pretrained(captioner, video_mode="merge")
    processor = tiny_processor(model)
    pixels = processor(videos=noise_images(4))["pixel_values_videos"]
    features, places, index = merging_overlay.trace_frames(model, pixels)
    torch.testing.assert_close(features, model.get_vision_features(pixels))
    assert index.shape == (4, model.config.num_vision_tokens)
    for token in range(1, model.config.num_vision_tokens):  # a token is the mean of the patches that it is drawn on
        frames, _ = (index == token).nonzero(as_tuple=True)
        assert places[0, token, 0] == pytest.approx(frames.float().mean())
    rows = visualize_merging.video_rows(model, processor, str(captioner / "video.webp"))
    assert all(row.groups[-1].shape == (4, 4) for row in rows)
    assert not np.array_equal(rows[0].groups[-1], rows[3].groups[-1])
