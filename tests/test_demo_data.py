"""The demo: its two towers, its data sets, and their one-time preparation."""

import io
import re
import tarfile
from collections import Counter

import pytest
import torch
from datasets import Image as DatasetsImage
from datasets import load_dataset
from huggingface_hub import constants
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from common.demo import emoji_videos, towers
from common.demo import scenes as demo_scenes
from common.demo.cache import demo_cache_dir, prepare_once
from common.demo.easy_vqa import COLORS, SHAPES, easy_vqa_captions, load_easy_vqa, load_easy_vqa_questions
from common.demo.emoji_videos import load_emoji_videos
from common.demo.scenes import CONCEPTS, RELATIONS, draw_scenes, held_out_pairs, load_scenes
from common.demo.towers import map_in_order, prepare_language_model, prepare_vision_tower

from .helpers import demo_packages_or_skip

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


@pytest.fixture(scope="module")
def tower(cache):
    return AutoModel.from_pretrained(prepare_vision_tower())


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


def test_every_concept_has_four_held_out_partners():
    assert Counter(concept for pair in held_out_pairs() for concept in pair) == dict.fromkeys(CONCEPTS, 4)


def test_scenes_are_the_same_in_every_run(scenes):
    first, again = list(draw_scenes("train", 12)), list(draw_scenes("train", 12))
    assert first == again
    assert [row["caption"] for row in first] == scenes["train"]["caption"][:12]
    assert [Image.open(io.BytesIO(row["image"])).tobytes() for row in first] == pixels(scenes["train"][:12])


def test_first_concept_is_drawn_in_the_first_half():
    for row in draw_scenes("test", 20):
        axis = next(axis for relation, axis in RELATIONS.items() if relation in row["caption"])
        scene = Image.open(io.BytesIO(row["image"]))
        # The strip between the halves shows the background alone: the drawings are apart along the relation's axis.
        middle = scene.crop((111, 0, 113, 224) if axis == 0 else (0, 111, 224, 113))
        other = scene.crop((0, 111, 224, 113) if axis == 0 else (111, 0, 113, 224))
        assert len(middle.getcolors()) == 1
        assert len(other.getcolors()) > 1


def test_preparation_happens_once(scenes, monkeypatch):
    monkeypatch.setattr(demo_scenes, "draw_scenes", None)  # a second preparation would call it
    again = load_scenes()
    assert again["train"]["caption"] == scenes["train"]["caption"] and len(again["test"]) == 60


def test_interrupted_preparation_leaves_nothing_that_looks_complete(cache):
    def killed(folder):
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    def complete(folder):
        folder.mkdir()
        (folder / "whole").touch()

    with pytest.raises(KeyboardInterrupt):
        prepare_once("interrupted", killed)
    assert not (cache / "interrupted").exists()
    assert [path.name for path in prepare_once("interrupted", complete).iterdir()] == ["whole"]


def test_preparation_leaves_the_random_numbers_as_they_were(cache):
    def write(folder):
        folder.mkdir()
        torch.nn.Linear(2, 2)  # whose weights are drawn

    before = torch.get_rng_state()
    prepare_once("drawn", write)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_faster_of_two_preparations_wins(cache):
    def overtaken(folder):
        folder.mkdir()
        (cache / "raced").mkdir()
        (cache / "raced" / "faster").touch()

    assert [path.name for path in prepare_once("raced", overtaken).iterdir()] == ["faster"]


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


def test_easy_vqa_asks_questions_about_its_images():
    splits = load_easy_vqa_questions()
    assert {name: len(split) for name, split in splits.items()} == {"train": 38575, "test": 9673}
    first = splits["train"].select(range(50))
    assert len(set(first["image"])) > 40 and set(first["answer_type"]) == {"yes/no", "color", "shape"}
    assert all(answers == [answer] for answers, answer in zip(first["answers"], first["answer"], strict=True))
    with Image.open(first[0]["image"]) as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ("1f468-1f3fe-200d-1f373", ("man cook", "medium-dark skin tone")),
        ("1f468-200d-1f373", ("man cook", "")),
        ("1f44b-1f3fb", ("waving hand", "light skin tone")),
        ("1f3f4-e0067_e0062", None),
        ("110000", None),
    ],
)
def test_emoji_are_named_without_their_tone(codes, expected):
    assert emoji_videos._name_and_tone(codes) == expected


def save_emoji(folder, codes, frames):
    images = [Image.new("RGB", (8, 8), (40 * index, 0, 0)) for index in range(frames)]
    path = folder / f"{codes}.webp"
    images[0].save(path, save_all=True, append_images=images[1:])
    return path


def test_one_tone_of_each_emoji_that_moves_is_held_out(monkeypatch, tmp_path):
    tones = ["", *(f"-{tone:x}" for tone in range(0x1F3FB, 0x1F400))]
    files = [save_emoji(tmp_path, f"1f44b{tone}", frames=2) for tone in tones]
    files += [save_emoji(tmp_path, f"1f44d{tone}", frames=1) for tone in tones]  # does not move
    files += [save_emoji(tmp_path, "1f600", frames=2)]  # has no tones
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as tar:
        for file in files:
            tar.add(file, f"package/assets/{file.name}")
    monkeypatch.setattr(emoji_videos, "_fetch", lambda folder: tmp_path / "package.tgz")
    splits = load_dataset(str(load_emoji_videos()))
    assert splits["train"]["caption"] == ["waving hand"] * 5 and splits["test"]["caption"] == ["waving hand"]
    (held_out,) = splits["test"].cast_column("image", DatasetsImage(decode=False))["image"]
    assert held_out["path"].endswith("1f44b-1f3fe.webp")


def test_a_missing_npm_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji_videos.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"fetches .* with npm, which is not installed"):
        emoji_videos._fetch(tmp_path)


def test_vision_tower_gives_the_features_of_the_trained_classifier(tower, scenes):
    processor = AutoImageProcessor.from_pretrained(prepare_vision_tower())
    pixel_values = processor(scenes["train"][:2]["image"], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (2, 3, 224, 224) and pixel_values.min() >= -1 and pixel_values.max() <= 1
    with torch.no_grad():
        (features,) = tower(pixel_values).last_hidden_state
        expected = towers.load_efficientnet_lite0().forward_intermediates(
            pixel_values, indices=[3], intermediates_only=True
        )
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


def test_weights_that_do_not_fit_are_refused():
    wanted = {"conv.weight": torch.zeros(2, 3), "bn.bias": torch.zeros(2)}
    given = {"c.weight": torch.ones(2, 3), "b.bias": torch.ones(2)}
    assert list(map_in_order(given, wanted)) == list(wanted)
    with pytest.raises(ValueError, match=r"'b\.weight'"):
        map_in_order({"c.weight": given["c.weight"], "b.weight": torch.ones(2)}, wanted)
    with pytest.raises(ValueError, match="longer"):
        map_in_order({"c.weight": given["c.weight"]}, wanted)


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
