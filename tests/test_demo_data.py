"""The demo: its two towers, its data sets (what captions state is what is drawn), and their one-time preparation."""

import io
import re
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import constants
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from common.demo import crowded_scenes, emoji_videos, towers
from common.demo import scenes as demo_scenes
from common.demo.cache import demo_cache_dir, prepare_once
from common.demo.easy_vqa import COLORS, SHAPES, easy_vqa_captions, load_easy_vqa
from common.demo.emoji_videos import load_emoji_videos
from common.demo.scenes import CONCEPTS, HELD_OUT_STEPS, RELATIONS, draw_scenes, held_out_pairs, load_scenes
from common.demo.towers import prepare_language_model, prepare_vision_tower

from .helpers import demo_packages_or_skip, save_animation

CAPTION = re.compile(rf"(an?) ({'|'.join(CONCEPTS)}) ({'|'.join(RELATIONS)}) (an?) ({'|'.join(CONCEPTS)})")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this module's own, with the data packages alone, and few scenes."""
    home = tmp_path_factory.mktemp("hf_home")
    demo_packages_or_skip(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(home))
        patch.setattr(demo_scenes, "TRAIN_SCENES", 360)
        patch.setattr(demo_scenes, "TEST_SCENES", 60)
        yield demo_cache_dir()


@pytest.fixture(scope="module")
def scenes(cache):
    return load_scenes()


def pixels(split):
    return [image.convert("RGB").tobytes() for image in split["image"]]


def test_scenes_are_images_with_grammatical_captions(scenes):
    assert {name: len(split) for name, split in scenes.items()} == {"train": 360, "test": 60}
    for split in scenes.values():
        for row in split:
            assert row["image"].mode == "RGB" and row["image"].size == (224, 224)
            article, first, _, other_article, second = CAPTION.fullmatch(row["caption"]).groups()
            assert first != second
            assert (article == "an") == (first in ("owl", "airplane", "alarm clock"))
            assert (other_article == "an") == (second[0] in "aeiou")


def test_pairs_of_the_test_split_never_meet_in_training(scenes):
    pairs, seen = {}, Counter()
    for name, split in scenes.items():
        parsed = [CAPTION.fullmatch(caption).groups() for caption in split["caption"]]
        pairs[name] = {frozenset((first, second)) for _, first, _, _, second in parsed}
        if name == "train":
            seen.update(concept for _, first, _, _, second in parsed for concept in (first, second))
    assert pairs["train"].isdisjoint(held_out_pairs())
    assert pairs["test"] <= held_out_pairs()
    # 20 times on average
    assert set(seen) == set(CONCEPTS) and min(seen.values()) >= 5
    assert set(pixels(scenes["train"])).isdisjoint(pixels(scenes["test"]))


def test_scenes_are_prepared_once_and_the_same_in_every_run(scenes, monkeypatch):
    first, again = list(draw_scenes("train", 12)), list(draw_scenes("train", 12))
    assert first == again
    assert [row["caption"] for row in first] == scenes["train"]["caption"][:12]
    assert [Image.open(io.BytesIO(row["image"])).tobytes() for row in first] == pixels(scenes["train"][:12])
    monkeypatch.setattr(demo_scenes, "draw_scenes", None)  # a second preparation would call it
    assert load_scenes()["train"]["caption"] == scenes["train"]["caption"]


def test_first_concept_is_drawn_in_the_first_half():
    for row in draw_scenes("test", 20):
        axis = next(axis for relation, axis in RELATIONS.items() if relation in row["caption"])
        scene = Image.open(io.BytesIO(row["image"]))
        # The strip between the halves shows the background alone: the drawings are apart along the relation's axis.
        middle = scene.crop((111, 0, 113, 224) if axis == 0 else (0, 111, 224, 113))
        other = scene.crop((0, 111, 224, 113) if axis == 0 else (111, 0, 113, 224))
        assert len(middle.getcolors()) == 1
        assert len(other.getcolors()) > 1


def test_the_boxes_of_scenes_hold_all_that_is_drawn():
    for row in draw_scenes("test", 8):
        scene = Image.open(io.BytesIO(row["image"]))
        background = scene.getpixel((0, 0))
        assert all(concept in row["caption"] for concept in row["boxes"]) and len(row["boxes"]) == 2
        for box in row["boxes"].values():
            assert len(scene.crop(box).getcolors(2**16)) > 2
            scene.paste(background, box)
        assert scene.getcolors() == [(224 * 224, background)]


def test_a_preparation_that_is_killed_or_overtaken_leaves_nothing_that_looks_complete(cache):
    def write(folder, name):
        folder.mkdir()
        (folder / name).touch()

    def killed(folder):
        write(folder, "half")
        raise KeyboardInterrupt

    def overtaken(folder):
        write(folder, "slower")
        write(cache / "raced", "faster")

    with pytest.raises(KeyboardInterrupt):
        prepare_once("interrupted", killed)
    assert not (cache / "interrupted").exists()
    whole = prepare_once("interrupted", lambda folder: write(folder, "whole"))
    assert [path.name for path in whole.iterdir()] == ["whole"]
    assert [path.name for path in prepare_once("raced", overtaken).iterdir()] == ["faster"]


def layouts(held_out, count=300):
    rng = np.random.default_rng(0)
    return [crowded_scenes.draw_layout(rng, held_out) for _ in range(count)]


def test_crowded_scenes_hold_one_to_eight_drawings_of_more_than_forty_things():
    scenes = layouts(held_out=False, count=1000)
    assert {sum(map(len, rows)) for rows in scenes} == set(range(1, 9))
    assert max(len(row) for rows in scenes for row in rows) == 4
    assert {concept for rows in scenes for row in rows for concept in row} == set(crowded_scenes.CONCEPTS)
    assert len(crowded_scenes.CONCEPTS) > 40


def test_crowded_scenes_of_training_never_show_the_pairs_that_each_test_scene_has():
    def pairs(rows):
        drawings = [crowded_scenes.CONCEPTS.index(concept) for row in rows for concept in row]
        count = len(crowded_scenes.CONCEPTS)
        return [(a, b) for a in drawings for b in drawings if (a - b) % count in HELD_OUT_STEPS]

    assert not any(pairs(rows) for rows in layouts(held_out=False))
    assert all(pairs(rows) for rows in layouts(held_out=True) if sum(map(len, rows)) > 1)


def test_a_caption_lists_the_drawings_row_by_row():
    assert crowded_scenes.caption([["owl", "crab", "frog"], ["bus"], ["owl", "key"]]) == (
        "an owl, a crab and a frog above a bus above an owl and a key"
    )


def test_crowded_scenes_have_a_row_each_and_are_the_same_in_every_run(monkeypatch):
    monkeypatch.setattr(crowded_scenes, "SPLITS", {"train": 3, "test": 2})
    splits = crowded_scenes.load_crowded_scenes()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 3, "test": 2}
    scene = splits["train"][0]
    assert scene["image"].size == (448, 448) and scene["caption"].startswith("a")
    assert list(crowded_scenes.draw_crowds("test", 2)) == list(crowded_scenes.draw_crowds("test", 2))
    texts = crowded_scenes.load_crowded_questions()["train"][0]
    asked = [(text["question"], text["answer"]) for text in scene["questions"]]
    assert texts["image"] == scene["image"] and len(asked) > 1
    assert list(zip(texts["question"], texts["answer"], strict=True)) == [("", scene["caption"]), *asked]


def test_easy_vqa_captions_follow_from_the_questions():
    questions = [
        ["what is the blue shape?", "triangle", 0],
        ["is there not a red shape in the image?", "no", 1],
        ["is there a circle?", "no", 1],
        ["is no rectangle present?", "yes", 1],
        ["what color is the circle?", "gray", 2],
        ["is there a red shape?", "no", 3],  # which other color, and which shape?
    ]
    assert easy_vqa_captions(questions) == {0: "a blue triangle", 1: "a red triangle", 2: "a gray circle"}


def test_easy_vqa_shares_no_image_between_its_splits():
    splits = load_easy_vqa()
    assert {name: len(split) for name, split in splits.items()} == {"train": 3578, "test": 888}
    assert set(pixels(splits["train"])).isdisjoint(pixels(splits["test"]))
    kinds = {f"a {color} {shape}" for color in COLORS for shape in SHAPES}
    assert set(splits["train"]["caption"]) == set(splits["test"]["caption"]) == kinds


def save_emoji(folder, codes, frames):
    images = [Image.new("RGB", (8, 8), (40 * index, 0, 0)) for index in range(frames)]
    save_animation(folder / f"{codes}.webp", images)


def test_one_tone_of_each_emoji_that_moves_is_held_out(monkeypatch, tmp_path):
    (tmp_path / "assets").mkdir()
    for tone in ("", *(f"-{tone:x}" for tone in range(0x1F3FB, 0x1F400))):
        save_emoji(tmp_path / "assets", f"1f44b{tone}", frames=2)
        save_emoji(tmp_path / "assets", f"1f468{tone}-200d-1f373", frames=2)
        save_emoji(tmp_path / "assets", f"1f44d{tone}", frames=1)  # does not move
    for codes in ("1f600", "110000"):  # without tones, and without a name
        save_emoji(tmp_path / "assets", codes, frames=2)
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        tar.add(tmp_path / "assets", "package/assets")
    monkeypatch.setattr(emoji_videos, "_fetch", lambda folder: tmp_path / "package.tgz")
    splits = load_dataset(str(load_emoji_videos()))
    assert Counter(splits["train"]["caption"]) == {"waving hand": 5, "man cook": 5}
    assert Counter(splits["test"]["caption"]) == {"waving hand": 1, "man cook": 1}


def test_vision_tower_gives_the_features_of_the_trained_classifier(scenes):
    tower = AutoModel.from_pretrained(prepare_vision_tower())
    processor = AutoImageProcessor.from_pretrained(prepare_vision_tower())
    pixel_values = processor(scenes["train"][:2]["image"], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (2, 3, 224, 224) and pixel_values.min() >= -1 and pixel_values.max() <= 1
    with torch.no_grad():
        (features,) = tower(pixel_values).last_hidden_state
        classifier = towers.load_efficientnet_lite0()
        expected = classifier.forward_intermediates(pixel_values, indices=[3], intermediates_only=True)
    assert features.shape == (2, 112, 14, 14)
    torch.testing.assert_close(features, expected[0])


def test_vision_weights_are_those_trained_on_imagenet():
    # Drawn full-size on white, the umbrella is one that a classifier of photographs knows as well (class 879).
    drawing = demo_scenes.rasterise("umbrella")
    canvas = Image.new("RGB", (224, 224), "white")
    canvas.paste(drawing, tuple((224 - side) // 2 for side in drawing.size), mask=drawing)
    pixel_values = torch.tensor(list(canvas.tobytes())).view(1, 224, 224, 3).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        assert towers.load_efficientnet_lite0()(pixel_values).argmax().item() == 879


@pytest.mark.slow
def test_language_model_kept_its_tokens_and_its_senses(cache):
    folder = prepare_language_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("<|im_start|>a frog<|im_end|>") == [1, *tokenizer.encode("a frog"), 2]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
