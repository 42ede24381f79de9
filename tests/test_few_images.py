"""benchmarks/few_images: new and old scenes are trained, mixed and counted on tiny data; the page has its figures."""

import json
import re
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

from benchmarks.few_images import __main__ as few_images
from benchmarks.results import read_results

from .helpers import ROOT, save_image_folder, tiny_model
from .training import save_captioner

PUBLISHED = read_results(few_images.RESULTS)


@pytest.fixture
def few_steps(monkeypatch, tmp_path):
    """Two steps on gray scenes, an empty file of results, and a data set in place of the demo's scenes."""
    monkeypatch.setattr(few_images, "draw_scene", lambda *args: (Image.new("RGB", (40, 40), "gray"), {}))
    monkeypatch.setattr(few_images, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(few_images, "TEST_IMAGES", 4)
    monkeypatch.setattr(few_images.Run, "steps", 2)
    old = load_dataset(save_image_folder(tmp_path / "old"))
    monkeypatch.setattr(few_images, "load_scenes", lambda: old)


def test_each_number_of_images_is_trained_once(few_steps, tmp_path, monkeypatch, capsys):
    save_captioner(tmp_path / "model", tiny_model())
    command = ["--model", str(tmp_path / "model"), "--images", "2"]
    few_images.main(command)
    results = read_results(few_images.RESULTS)
    assert list(results) == ["2.seed0"]
    assert all(0 <= results[name][key] <= 1 for name in results for key in ("new", "old"))
    assert "| 2 | none | 2 | 1 | 0 | 0 |" in capsys.readouterr().out  # a fresh model captions nothing right
    monkeypatch.setattr(few_images, "train", pytest.fail)
    few_images.main(command)


def test_old_scenes_are_half_of_each_batch(few_steps, monkeypatch):
    def finetune(argv):
        entries = json.loads(Path(argv[argv.index("--mixture") + 1]).read_text())
        assert [entry["weight"] for entry in entries] == [1, 1] and entries[1]["dataset"] == "openmoji-scenes"
        return {"test_exact_captions": 0.5}

    monkeypatch.setattr(few_images.finetune, "main", finetune)
    monkeypatch.setattr(few_images, "old_share", lambda folder: 0.25)
    result = few_images.train(few_images.Run(2, True, 0), "model")
    assert (result["new"], result["old"]) == (0.5, 0.25)


def test_held_out_scenes_show_pairs_that_training_does_not(few_steps):
    thing = re.compile("|".join(few_images.THINGS))
    captions = {
        split: {scene["caption"] for scene in few_images.new_scenes(split, count, seed=0)}
        for split, count in {"train": 200, "test": 100}.items()
    }
    pairs = {split: {frozenset(thing.findall(text)) for text in captions[split]} for split in captions}
    assert not pairs["train"] & pairs["test"]
    assert all(len(pair) == 2 for split in pairs.values() for pair in split)
    assert set().union(*pairs["train"]) == set().union(*pairs["test"]) == set(few_images.THINGS)


def test_the_page_has_the_figures_of_the_results():
    page = (ROOT / "docs" / "your_own_captioner.md").read_text()
    assert few_images.table(PUBLISHED) in page
