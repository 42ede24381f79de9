"""The crowded scenes: what their captions and questions state is what the images show."""

import numpy as np
import pytest
from huggingface_hub import constants

from common.demo import crowded_scenes
from common.demo.crowded_scenes import CONCEPTS, caption, draw_crowds, draw_layout, load_crowded_scenes, questions
from common.demo.scenes import HELD_OUT_STEPS

from .helpers import demo_packages_or_skip


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


def test_scenes_are_the_same_in_every_run(packages):
    first, second = (list(draw_crowds("test", 2)) for _ in range(2))
    assert first == second


def test_the_data_set_has_a_row_for_each_scene(monkeypatch, tmp_path):
    demo_packages_or_skip(tmp_path / "hf")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(crowded_scenes, "SPLITS", {"train": 3, "test": 2})
    splits = load_crowded_scenes()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "test": 2}
    scene = splits["train"][0]
    assert scene["image"].size == (448, 448) and scene["caption"].startswith("a")
    assert {question["kind"] for question in scene["questions"]} <= {"left of", "how many", "corner"}


def test_a_plural_follows_the_spelling():
    nouns = {"fly": "flies", "turkey": "turkeys", "fox": "foxes", "iris": "irises", "crow": "crows"}
    assert {noun: crowded_scenes.name_plural(noun) for noun in nouns} == nouns
