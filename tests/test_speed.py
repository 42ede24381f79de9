"""benchmarks/speed.py: every stopwatch runs from end to end at tiny sizes, and docs/speed.md shows its command."""

import re

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import models, speed
from benchmarks.models import DEMO_VISION, candidates

from .documents import commands_of_page
from .helpers import ROOT

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = LlamaConfig(**TINY, vocab_size=100, pad_token_id=2)


@pytest.fixture
def tiny_sizes(monkeypatch):
    """Tiny models, and this process in place of a new one, as each of these takes seconds to start."""
    demo = candidates(DEMO_VISION, hidden_size=64, layers=2, front_loaded=[98, 49], r=57, queries=9, text=TEXT)
    changed = {"SIZES": {"demo": demo}, "FRONT_LOADED": {257: [128, 64]}}
    for name, value in changed.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(models, "BERT_BASE", TINY)
    monkeypatch.setattr(speed, "in_new_process", lambda function, *arguments: function(*arguments))


def measure(capsys, *arguments):
    """The rows of the table that a stopwatch prints, without their names, as numbers."""
    with torch.compiler.set_stance("force_eager"):  # compilation takes a minute
        speed.main([*arguments, "--rounds", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set(lines[1]) <= set("|-") and len({len(row) for row in rows}) == 1
    return [[float(re.fullmatch(r"([\d.e+-]+)( ?(ms|s|MB|x|%))?", cell)[1]) for cell in row[1:]] for row in rows[2:]]


@pytest.mark.parametrize("what, tokens", [("connectors", [219, 65, 32, 257]), ("steps", [49, 82, 9, 25, 196])])
def test_candidates_are_compared_with_the_first(tiny_sizes, capsys, what, tokens):
    rows = measure(capsys, what)
    assert [row[0] for row in rows] == tokens
    assert rows[0][-1] == 1 and all(min(row) >= 0 and sum(row) > 0 for row in rows)  # no memory may be needed


def test_rows_of_several_texts_are_compared_with_separate_rows(tiny_sizes, capsys, monkeypatch):
    monkeypatch.setattr(speed, "BATCH", 2)
    rows = measure(capsys, "texts")
    assert [len(row) for row in rows] == [4] * 4 and all(row[0] == 1 for row in rows)


def test_the_page_shows_the_command_of_every_stopwatch():
    commands = commands_of_page(ROOT / "docs" / "speed.md")
    assert {command.arguments[0] for command in commands if command.name == "speed"} == set(speed.STOPWATCHES)
