"""benchmarks/words at tiny sizes, its places of drawings, and the area under the curve."""

import json

import pytest
import torch
from PIL import Image

from benchmarks.words import __main__ as words
from benchmarks.words.__main__ import RESULTS, area_under_curve, print_tables, touched
from modeling_evlgen import explanations

from .helpers import save, tiny_model, tiny_processor


@pytest.mark.parametrize("connector", [{"class_token": False}, {"model_type": "evlgen_mlp", "pool_size": 2}])
def test_each_noun_of_a_caption_is_measured(connector, tmp_path, monkeypatch):
    model = tiny_model("siglip", **connector)
    save(tmp_path / "model", model, tiny_processor(model))
    monkeypatch.setattr(words, "SCENES", 2)
    monkeypatch.setattr(words, "CAPTIONED", 2)
    monkeypatch.setattr(explanations, "find_words", None)  # the benchmark sets it
    hits = words.measure(words.Run(str(tmp_path / "model"), "scenes"))["hits"]
    # Tokens of the MLP are made of no patches of their own.
    assert {name: len(found) for name, found in hits.items()} == dict.fromkeys(
        ["integrated gradients", "integrated gradients, of a token"][: 1 + ("class_token" in connector)], 4
    )
    if "class_token" in connector:  # merged videos need an MLP without groups
        hits = words.measure(words.Run(str(tmp_path / "model"), "videos"))["hits"]
        assert {name: len(found) for name, found in hits.items()} == {"integrated gradients": 4}
    doubt = words.measure(words.Run(str(tmp_path / "model"), "half-size"))["doubt"]
    assert [*doubt] == ["wrong", "probability", "evidence", "confidence"]  # random weights write no nouns


def test_patches_touch_a_drawing_that_they_overlap_in_its_frames():
    frogs = [("frog", (0, 0, 10, 10), slice(1)), ("frog", (15, 25, 21, 40), slice(1, 3))]
    drawings = [*frogs, ("owl", (30, 0, 40, 10), slice(3))]
    found = touched("frog", drawings, Image.new("RGB", (40, 40)), torch.Size([3, 4, 4])).int().tolist()
    later = [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    assert found == [[[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], later, later]


def test_a_video_shows_one_drawing_after_the_other():
    ((frames, caption, drawings),) = words.draw("videos", 1)
    ((scene,), same_caption, _) = next(words.draw("scenes", 1))
    assert caption == same_caption and len(frames) == 2 * words.FRAMES
    for noun, box, shown in drawings:
        for number, frame in enumerate(frames):
            is_there = frame.crop(box).tobytes() == scene.crop(box).tobytes()
            assert is_there == (number in range(shown.start, shown.stop)), noun


def test_the_area_is_the_share_of_pairs_in_the_right_order():
    is_wrong = torch.tensor([True, False, True, False])
    assert area_under_curve(torch.tensor([4.0, 1, 3, 2]), is_wrong) == 1
    assert area_under_curve(torch.tensor([1.0, 4, 2, 2]), is_wrong) == pytest.approx(1 / 8)


def test_the_page_has_the_figures_of_the_results(capsys):
    print_tables([json.loads(line) for line in RESULTS.read_text().splitlines()])
    printed = capsys.readouterr().out
    assert (
        "| integrated gradients | 99 [96, 100] |" in printed and "| integrated gradients | 94 [83, 100] |" in printed
    )
    assert "| wrong names by confidence, area | 74 [73, 76] |" in printed
