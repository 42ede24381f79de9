"""The comparison of connectors on crowded scenes runs from end to end, on a few small scenes."""

import json
from functools import partial
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from benchmarks.crowded import __main__ as crowded
from benchmarks.crowded import budget_run, caption_run
from benchmarks.crowded.budget_run import BudgetRun
from benchmarks.crowded.budget_tables import Cost, step_table
from benchmarks.crowded.caption_run import CaptionRun, name_score
from benchmarks.crowded.connector_settings import (
    ALL_TOKENS,
    BUDGETS,
    CHOOSING_QFORMER,
    CHOOSING_TOMEFORMER,
    TILES,
    VIEW,
    connector_fields,
)
from benchmarks.crowded.scene_questions import NO_ANSWER, list_questions, read_answers
from benchmarks.planned_runs import read_results
from common.demo import crowded_scenes

from .helpers import demo_packages_or_skip, save_stamps, save_towers

TRAINED = (CHOOSING_TOMEFORMER, "means", VIEW, TILES, ALL_TOKENS)


@pytest.fixture
def small_scenes(monkeypatch, tmp_path):
    """A few scenes of 96 x 96 pixels, so of 36 tokens, and two numbers of tokens."""
    demo_packages_or_skip(tmp_path / "hf")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(crowded_scenes, "SPLITS", {"train": 8, "test": 4})
    for module in (crowded, crowded_scenes):
        monkeypatch.setattr(module, "STAMPS", tmp_path / "stamps")
    monkeypatch.setattr(budget_run, "VIEW_SIZE", 48)  # so four tiles of 9 tokens
    monkeypatch.setattr(budget_run, "BUDGETS", (4, 9))
    monkeypatch.setattr(budget_run, "REFERENCE_BUDGET", 4)
    monkeypatch.setattr(crowded, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(crowded, "CURVES", tmp_path / "curves.png")


def test_methods_are_trained_measured_and_compared(small_scenes, monkeypatch, capsys):
    save_stamps(crowded_scenes.STAMPS, 44)
    plan = [BudgetRun(method, size=96, steps=1) for method in TRAINED]
    plan.append(BudgetRun(CHOOSING_TOMEFORMER, size=96, steps=1, budget=4))
    plan.append(BudgetRun(CHOOSING_TOMEFORMER, size=96, steps=1, stamps=True))
    monkeypatch.setattr(crowded, "PLAN", plan)
    monkeypatch.setattr(crowded, "BudgetRun", partial(BudgetRun, size=96))
    monkeypatch.setattr(crowded, "ROUNDS", 1)
    monkeypatch.setattr(crowded, "CAPTION_PLAN", [])
    crowded.main([])
    results = [json.loads(line) for line in crowded.RESULTS.read_text().splitlines()]
    assert [BudgetRun(**result["run"]) for result in results] == plan
    by_method = {result["run"]["method"]: result for result in results[:-2]}
    assert all(by_method[method]["held_out"].keys() == {"4", "9"} for method in (CHOOSING_TOMEFORMER, VIEW, TILES))
    assert by_method[TILES]["flops_per_step"] > by_method[VIEW]["flops_per_step"]  # of four times as many tokens
    assert by_method[ALL_TOKENS]["held_out"].keys() == {"36"}
    assert results[-2]["held_out"].keys() == {"4"} and results[-1]["held_out"].keys() == {"4", "9"}
    printed = capsys.readouterr().out
    assert all(f"| {method} | 1 |" in printed for method in TRAINED) and "96 pixels, stamps, textured, 1" in printed
    assert crowded.CURVES.stat().st_size > 0

    monkeypatch.setattr(crowded, "train", pytest.fail)  # a finished run is not trained again
    monkeypatch.setattr(crowded, "report", lambda: None)
    crowded.main([])


def test_captions_of_the_language_model_are_trained_and_read(small_scenes, monkeypatch, tmp_path, capsys):
    save_stamps(crowded_scenes.STAMPS, 44)
    recipe = yaml.safe_load(caption_run.RECIPE.read_text())
    recipe |= {"text_model": save_towers(tmp_path)["text_model"], "max_new_tokens": 4, "whitening_images": 8}
    recipe |= {"image_token_range": [9, 16], "num_image_tokens": 9}
    monkeypatch.setattr(caption_run, "RECIPE", tmp_path / "recipe.yaml")
    caption_run.RECIPE.write_text(yaml.safe_dump(recipe))
    plan = [CaptionRun(method, tokens=4, steps=1) for method in ("means", CHOOSING_QFORMER)]
    plan.append(CaptionRun(CHOOSING_QFORMER, tokens=None, steps=1, stamps=True))
    monkeypatch.setattr(caption_run, "BUDGETS", (9, 16))
    monkeypatch.setattr(crowded, "PLAN", [])
    monkeypatch.setattr(crowded, "CAPTION_PLAN", plan)
    monkeypatch.setattr(crowded, "TIMED", ("means",))
    monkeypatch.setattr(crowded, "ROUNDS", 1)
    crowded.main([])
    results = [json.loads(line) for line in crowded.RESULTS.read_text().splitlines()]
    assert [CaptionRun(**result["run"]) for result in results] == plan
    assert [list(result["held_out"]) for result in results] == [["4"], ["4"], ["9", "16"]]
    figures = [figures for result in results for figures in result["held_out"].values()]
    assert all(len(each["captions"]) == 4 and each["test_loss"] > 0 for each in figures)
    printed = capsys.readouterr().out
    assert f"| {CHOOSING_QFORMER} | OpenMoji | 1 | 4 | this number | 1 |" in printed
    assert f"| {CHOOSING_QFORMER} | stamps | 1 | 16 | any number | 1 |" in printed


def test_the_recipe_has_the_connector_of_the_comparison():
    recipe = yaml.safe_load(caption_run.RECIPE.read_text())
    fields = {**recipe["connector_config"], "model_type": f"evlgen_{recipe['connector']}", "class_token": False}
    compared = connector_fields(CHOOSING_QFORMER, caption_run.GRID_SIZE, max(BUDGETS))
    assert {**fields, "max_position_embeddings": 2048} == compared
    assert recipe["image_token_range"] == [min(BUDGETS), max(BUDGETS)]


def test_the_table_of_steps_has_operations_and_relative_times():
    table = step_table({"a": {9: Cost(2e9, 0.5), 16: Cost(4e9, 1)}, "b": {9: Cost(6e9, 2), 16: Cost(7e9, 3)}})
    assert table.splitlines()[2:] == ["| a | 2; 1.00 | 4; 2.00 |", "| b | 6; 4.00 | 7; 6.00 |"]


def test_the_score_of_names_counts_each_drawing():
    truths = ["an owl and an owl above a teddy bear", "a bus"]
    things = ["bear", "bus", "crab", "owl", "teddy bear"]
    assert name_score(truths, truths, things) == 1
    # Found are an owl, a teddy bear and a bus of four drawings. The captions name five.
    assert name_score(["an owl, a teddy bear and a crab", "a bus and a bus"], truths, things) == 6 / 9
    assert name_score(["a bear and an owls", ""], truths, things) == 0


def test_the_published_results_keep_their_names():
    published = read_results(Path(crowded.__file__).parent / "results.jsonl")
    kinds = {name: CaptionRun if name.startswith("captions") else BudgetRun for name in published}
    assert published and all(kinds[name](**result["run"]).name == name for name, result in published.items())
    assert BudgetRun(CHOOSING_TOMEFORMER, stamps=True).name != BudgetRun(CHOOSING_TOMEFORMER).name


@pytest.mark.parametrize("stamps", [False, True])
def test_answers_are_those_of_the_data_sets_questions(small_scenes, stamps):
    save_stamps(crowded_scenes.STAMPS, 44)
    scenes, things = crowded_scenes.load_crowded_scenes(96, stamps=stamps)["train"], crowded_scenes.list_things(stamps)
    answers, asked = read_answers(scenes["caption"][:], things), list_questions(scenes, things)
    truths = [text["answer"] for row in scenes["questions"] for text in row]
    for kind, scene, place, truth in zip(*asked, truths, strict=True):
        if kind == "how many":
            assert crowded_scenes.NUMBERS[answers.how_many[scene, place]] == truth
        else:
            table = answers.left_of if kind == "left of" else answers.corner
            assert things[table[scene, place]] == truth.split(" ", 1)[1]


def test_a_thing_without_a_left_neighbour_has_no_answer():
    answers = read_answers(["an owl and a teddy bear above an owl and a bus"])
    owl, bear, bus = (crowded_scenes.CONCEPTS.index(name) for name in ("owl", "teddy bear", "bus"))
    assert answers.how_many[0, [owl, bear, bus]].tolist() == [2, 1, 1] and answers.how_many.sum() == 4
    assert answers.left_of[0, [owl, bear, bus]].tolist() == [NO_ANSWER, owl, owl]
    assert answers.corner[0].tolist() == [owl, bear, owl, bus]
