"""The comparison of connectors on crowded scenes runs from end to end, on a few small scenes."""

import json

import pytest
from huggingface_hub import constants

from benchmarks.crowded import __main__ as crowded
from benchmarks.crowded import budget_run
from benchmarks.crowded.budget_run import BudgetRun, names_f1
from benchmarks.crowded.connector_settings import VIEW
from common.demo import crowded_scenes

from .helpers import demo_packages_or_skip

TRAINED = ("choose", "means", VIEW)


@pytest.fixture
def small_scenes(monkeypatch, tmp_path):
    """A few scenes of 96 x 96 pixels, so of 36 tokens, and two numbers of tokens."""
    demo_packages_or_skip(tmp_path / "hf")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(crowded_scenes, "SPLITS", {"train": 8, "test": 4})
    for module in (budget_run, budget_run.connector_fields.__globals__):
        monkeypatch.setitem(module if isinstance(module, dict) else vars(module), "BUDGETS", (4, 9))
    monkeypatch.setattr(budget_run, "REFERENCE_BUDGET", 4)
    monkeypatch.setattr(crowded, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(crowded, "CURVES", tmp_path / "curves.png")


def test_methods_are_trained_measured_and_compared(small_scenes, monkeypatch, capsys):
    plan = [BudgetRun(method, size=96, steps=1) for method in TRAINED]
    plan.append(BudgetRun("choose", size=96, steps=1, budget=4))
    monkeypatch.setattr(crowded, "PLAN", plan)
    crowded.main([])
    results = [json.loads(line) for line in crowded.RESULTS.read_text().splitlines()]
    assert [BudgetRun(**result["run"]) for result in results] == plan
    by_method = {result["run"]["method"]: result for result in results[:-1]}
    assert all(result["held_out"].keys() == {"4", "9"} for result in by_method.values())
    assert results[-1]["held_out"].keys() == {"4"}
    printed = capsys.readouterr().out
    assert all(f"| {method} | 1 |" in printed for method in TRAINED) and crowded.CURVES.stat().st_size > 0

    monkeypatch.setattr(crowded, "train", pytest.fail)  # a finished run is not trained again
    crowded.main([])


@pytest.mark.parametrize(
    "text, truth, score",
    [
        ("an owl , a crab above a bus", "an owl and a crab above a bus", 1),
        ("a teddy bear", "a teddy bear above an owl", 2 / 3),
        ("an owl and an owl", "an owl", 2 / 3),
        ("a bus", "an owl", 0),
        ("", "an owl", 0),
    ],
)
def test_names_found(text, truth, score):
    assert names_f1(text, truth) == pytest.approx(score)
