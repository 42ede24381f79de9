"""The crowded scenes: what their captions and questions state is what the images show."""

import io

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from common.demo import crowded_scenes
from common.demo.crowded_scenes import (
    CONCEPTS,
    caption,
    draw_background,
    draw_crowds,
    draw_layout,
    list_things,
    load_crowded_scenes,
    questions,
)
from common.demo.scenes import HELD_OUT_STEPS
from common.demo.stamps import load_stamps

from .helpers import demo_packages_or_skip, save_stamp, save_stamps


def layouts(held_out, count=300):
    rng = np.random.default_rng(0)
    return [draw_layout(rng, held_out) for _ in range(count)]


def held_out_pairs(rows):
    drawings = [CONCEPTS.index(concept) for row in rows for concept in row]
    return [(a, b) for a in drawings for b in drawings if (a - b) % len(CONCEPTS) in HELD_OUT_STEPS]


def test_scenes_hold_one_to_eight_drawings_of_more_than_forty_things():
    scenes = layouts(held_out=False, count=1000)
    assert {sum(map(len, rows)) for rows in scenes} == set(range(1, 9))
    assert max(len(row) for rows in scenes for row in rows) == 4
    assert {concept for rows in scenes for row in rows for concept in row} == set(CONCEPTS)
    assert len(CONCEPTS) > 40 and len(set(CONCEPTS)) == len(CONCEPTS)


def test_training_never_shows_the_pairs_that_each_test_scene_of_several_drawings_has():
    assert not any(held_out_pairs(rows) for rows in layouts(held_out=False))
    assert all(held_out_pairs(rows) for rows in layouts(held_out=True) if sum(map(len, rows)) > 1)


def test_a_caption_lists_the_drawings_row_by_row():
    assert caption([["owl", "crab", "frog"], ["bus"], ["owl", "key"]]) == (
        "an owl, a crab and a frog above a bus above an owl and a key"
    )


def test_questions_have_the_answers_of_the_scene():
    kinds = set()
    for scene, rows in enumerate(layouts(held_out=False)):
        drawings = [concept for row in rows for concept in row]
        for asked in questions(rows, scene):
            kind, question, answer = asked["kind"], asked["question"], asked["answer"]
            kinds.add(kind)
            if kind == "left of":
                right = question.removeprefix("What is left of the ").removesuffix("?")
                (row,) = [row for row in rows if right in row]
                assert answer.split(" ", 1)[1] == row[row.index(right) - 1] and drawings.count(right) == 1
            elif kind == "how many":
                noun = question.removeprefix("How many ").removesuffix(" are there?")
                singular = {"butterflies": "butterfly", "strawberries": "strawberry", "octopuses": "octopus"}
                singular |= {"buses": "bus", "cactuses": "cactus"}
                number = ("zero", "one", "two").index(answer)
                assert drawings.count(singular.get(noun, noun.removesuffix("s"))) == number
            else:
                row = rows[0] if "top" in question else rows[-1]
                assert answer.split(" ", 1)[1] == (row[0] if "left" in question else row[-1])
    assert kinds == {"left of", "how many", "corner"}


@pytest.fixture
def packages():
    demo_packages_or_skip()


@pytest.mark.parametrize("size, textured", [(448, True), (672, False)])
def test_images_have_the_size_and_are_the_same_in_every_run(packages, size, textured):
    first, second = (list(draw_crowds("test", 2, size, textured)) for _ in range(2))
    assert first == second
    assert all(Image.open(io.BytesIO(png)).size == (size, size) for png, _ in first)


def test_the_data_set_has_a_row_for_each_scene(monkeypatch, tmp_path):
    demo_packages_or_skip(tmp_path / "hf")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(crowded_scenes, "SPLITS", {"train": 3, "test": 2})
    splits = load_crowded_scenes(448, textured=False)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "test": 2}
    scene = splits["train"][0]
    assert scene["image"].size == (448, 448) and scene["caption"].startswith("a")
    assert {question["kind"] for question in scene["questions"]} <= {"left of", "how many", "corner"}


def test_scenes_of_all_sizes_and_backgrounds_show_the_same_things(packages):
    small, large = (list(draw_crowds("test", 3, *scene)) for scene in ((448, True), (672, False)))
    assert [rows for _, rows in small] == [rows for _, rows in large]


def test_only_a_texture_varies():
    rng = np.random.default_rng(0)
    assert draw_background(64, False, rng).std(axis=(0, 1)).max() == 0
    assert draw_background(64, True, rng).std(axis=(0, 1)).min() > 5


@pytest.fixture
def stamps(monkeypatch, tmp_path):
    """The names of installed stamps, half as many again as scenes need."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(crowded_scenes, "STAMPS", tmp_path / "stamps")
    monkeypatch.setattr(crowded_scenes, "SPLITS", {"train": 12, "test": 12})
    return save_stamps(tmp_path / "stamps", 66)


def test_scenes_of_stamps_are_those_of_the_drawings_with_other_things(stamps):
    chosen = list_things(stamps=True)
    assert chosen == [stamps[index * 66 // len(CONCEPTS)] for index in range(len(CONCEPTS))]
    splits = load_crowded_scenes(96, textured=False, stamps=True)
    for split, scenes in splits.items():
        layouts = np.random.default_rng((("train", "test").index(split), 0))
        for scene, captioned in zip(range(12), scenes["caption"], strict=True):
            rows = draw_layout(layouts, held_out=split == "test")
            assert bool(held_out_pairs(rows)) == (split == "test" and sum(map(len, rows)) > 1)
            renamed = [[chosen[CONCEPTS.index(concept)] for concept in row] for row in rows]
            assert captioned == caption(renamed)
            assert scenes[scene]["questions"] == questions(renamed, scene, chosen)


def test_a_scene_of_stamps_shows_the_stamps_of_its_caption(stamps):
    drawings = crowded_scenes.load_installed_stamps()
    for png, rows in draw_crowds("train", 6, 448, False, stamps=True):
        image = np.asarray(Image.open(io.BytesIO(png))).reshape(-1, 3)
        for name in {name for row in rows for name in row}:
            color = drawings[name].getpixel((50, 50))[:3]
            assert (abs(image.astype(int) - color).max(axis=1) < 4).sum() > 20


def test_other_installed_stamps_make_other_scenes(stamps):
    before = load_crowded_scenes(96, stamps=True)
    for path in (crowded_scenes.STAMPS / "animals").glob("*.txt"):
        path.write_text(path.read_text().replace("A ", "A k"))
    load_stamps.cache_clear()
    after = load_crowded_scenes(96, stamps=True)
    assert before["train"]["caption"][:] != after["train"]["caption"][:]
    assert before["train"]._fingerprint != after["train"]._fingerprint


def test_a_stamp_is_used_if_scenes_and_captions_have_a_place_for_it(tmp_path):
    save_stamp(tmp_path / "animals" / "birds", "owl-1", "white", "An owl.")
    save_stamp(tmp_path / "animals" / "birds", "owl-2", "gray", "An owl.")  # the same name again
    save_stamp(tmp_path / "animals", "toad", "green", "A toad.", "noflip\nscale 30%")
    save_stamp(tmp_path / "food", "pear", "yellow", "A pear")
    unusable = {"red ball": "A red ball.", "boom": "Boom!!!", "unit": "A unit.", "deer": "A deer.", "letter": "The a."}
    for name, description in unusable.items():
        save_stamp(tmp_path / "others", name, "red", description)
    save_stamp(tmp_path / "others", "word", "red", "A word.", "nomirror")
    save_stamp(tmp_path / "others", "shape", "red", "A shape.", "colorable")
    save_stamp(tmp_path / "others", "crumb", "red", "A crumb.", size=89)
    save_stamp(tmp_path / "others", "square", "red", "A square.")
    Image.new("RGB", (100, 100), "red").save(tmp_path / "others" / "square.png")
    Image.new("RGBA", (100, 100), "red").save(tmp_path / "others" / "unnamed.png")
    stamps = load_stamps(tmp_path, 3, 90)
    assert list(stamps) == ["owl", "toad", "pear"] and stamps["owl"].getpixel((50, 50)) == (255, 255, 255, 255)
    with pytest.raises(ValueError, match=f"need 4 stamps .* the folder '{tmp_path}' has 3"):
        load_stamps(tmp_path, 4, 90)


def test_scenes_of_stamps_need_the_installed_stamps(stamps, monkeypatch, tmp_path):
    monkeypatch.setattr(crowded_scenes, "STAMPS", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"need 44 stamps .*nowhere' has 0\. .* apt install tuxpaint-stamps-default"):
        load_crowded_scenes(96, stamps=True)


def test_a_plural_follows_the_spelling():
    nouns = {"fly": "flies", "turkey": "turkeys", "fox": "foxes", "iris": "irises", "crow": "crows"}
    assert {noun: crowded_scenes.name_plural(noun) for noun in nouns} == nouns
