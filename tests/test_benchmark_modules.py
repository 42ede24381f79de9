"""Every module of benchmarks/ runs from end to end, at tiny sizes. claims and paper_scale have tests of their own."""

import json
import os
import re

import pretrain
import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, ViTConfig

from benchmarks import (
    cached_features,
    cnn_tower,
    connector_speed,
    export_speed,
    quantization_speed,
    timing,
    token_numbers,
    training_step,
    video_speed,
)
from benchmarks.timing import markdown_table

from .helpers import save_image_folder, save_towers, tiny_model, tiny_processor

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = LlamaConfig(**TINY, vocab_size=100, pad_token_id=2)


def table(capsys) -> list[list[str]]:
    """The cells of the one table that a benchmark has printed, without its header."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert set(lines[1]) <= set("|-")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in rows}) == 1
    return rows[2:]


def is_number(cell: str) -> bool:
    return re.fullmatch(r"-?[\d.]+( ?(ms|s|MB|x|%))?", cell) is not None


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs here what runs in a new process, as each of these takes seconds to start."""
    for module in (training_step, video_speed):
        monkeypatch.setattr(module, "in_new_process", lambda function, *arguments: function(*arguments))


@pytest.fixture
def tiny_candidates(monkeypatch):
    """The candidates of the demo's size, with a tiny language model."""
    monkeypatch.setattr(training_step, "TEXT", TEXT)
    return training_step.candidates(
        training_step.DEMO_VISION, hidden_size=64, layers=2, front_loaded=[98, 49], r=57, queries=9
    )


def test_a_new_process_measures_alone():
    assert timing.in_new_process(os.getpid) != os.getpid()
    before = timing.peak_megabytes()
    torch.ones(2**26)  # 256 MB
    assert timing.peak_megabytes() >= before > 0


def test_candidates_take_turns_and_the_median_counts(monkeypatch):
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = {"a": [9, 1, 10, 2], "b": [9, 30, 60, 3]}  # of a round to warm up, and of three more

    def measure(run):
        run()
        return seconds[order[-1]][order.count(order[-1]) - 1]

    monkeypatch.setattr(timing, "measure", measure)
    assert timing.take_turns(runs, rounds=3) == {"a": 2, "b": 30}
    assert all(set(order[turn : turn + 2]) == {"a", "b"} for turn in range(0, 8, 2))


def test_a_markdown_table_has_a_line_for_each_row():
    assert markdown_table(["a", "b"], [[1, "x"], [2, "y"]]) == "| a | b |\n|---|---|\n| 1 | x |\n| 2 | y |"


def test_connectors_are_compared(monkeypatch, capsys):
    monkeypatch.setattr(connector_speed, "BERT_BASE", {**TINY, "num_hidden_layers": 4})
    connector_speed.main(["--tokens", "257", "--batch", "1", "--rounds", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) \| (\d+) \| ([\d.]+) s \| ([\d.]+) \| ([\d.]+) s \| ([\d.]+) \|$", out, re.MULTILINE)
    assert [(name, int(tokens)) for name, tokens, *_ in rows] == [
        ("TomeFormer, r = 19", 257 - 4 * 19),
        ("TomeFormer, front-loaded", 29),
        ("plain BERT encoder", 257),
        ("Q-Former, 32 queries", 32),
    ]
    assert rows[0][3] == rows[0][5] == "1.00"
    assert re.search(r"take [\d.]+% of the first forward\.\nIt runs at \d+% of the limit of \d+ GFLOP/s", out)


def test_operations_of_a_forward_are_those_of_its_matrix_products():
    size = {**TINY, "num_hidden_layers": 1}
    model = connector_speed.build_candidates(257, size, r=19, front_loaded=[128])["plain BERT encoder"].eval()
    tokens, dim = 257, 64
    expected = 2 * tokens * 1408 * dim + 2 * tokens * 4 * dim**2 + 4 * tokens**2 * dim + 2 * tokens * 2 * dim * 64
    assert timing.count_flops(lambda: model(torch.randn(1, 257, 1408))) == expected


def test_training_steps_of_all_connectors_are_compared(tiny_candidates, in_this_process, capsys):
    training_step.compare_connectors("demo", tiny_candidates, rounds=1)
    rows = table(capsys)
    assert [row[0] for row in rows] == list(tiny_candidates)
    assert [int(row[1]) for row in rows] == [49, 82, 9, 25, 196]
    assert all(is_number(cell) for row in rows for cell in row[1:])
    assert rows[0][2] == rows[0][-1] == "1.00"


def test_changes_of_a_training_step_are_compared(tiny_candidates, capsys):
    constant, front_loaded = tiny_candidates["EVLGen, r = 57"], tiny_candidates["EVLGen, front-loaded"]
    with torch.compiler.set_stance("force_eager"):  # compilation takes a minute
        training_step.compare_steps(constant, front_loaded, rounds=1)
    rows = table(capsys)
    assert len(rows) == 5 and rows[0][1:] == ["1.00", "1.00 x"] and all(is_number(row[1]) for row in rows)


def test_soft_prompts_have_the_lengths_of_the_published_tables():
    tokens = [[config.num_image_tokens for config in configs.values()] for configs in training_step.SIZES.values()]
    assert tokens == [[25, 41, 25, 25, 196], [29, 34, 29, 26, 257]]


def test_quantised_language_models_are_compared(tiny_candidates, capsys):
    model = training_step.build(tiny_candidates["EVLGen, front-loaded"])
    quantization_speed.compare(model, rounds=1)
    rows = table(capsys)
    assert [row[0] for row in rows] == ["float32", "bfloat16", "int8", "int4"]
    assert rows[0][2:] == ["1.00", "1.00"] and all(is_number(cell) for row in rows for cell in row[1:])


def test_quantised_weights_count_as_they_are_packed(tiny_candidates):
    models = quantization_speed.load_candidates(training_step.build(tiny_candidates["EVLGen, front-loaded"]))
    float32, bfloat16, int8, int4 = (quantization_speed.megabytes(models[name]) for name in models)
    assert bfloat16 == float32 / 2 and int4 < int8 < bfloat16


def test_numbers_of_tokens_are_measured(monkeypatch, capsys):
    monkeypatch.setattr(token_numbers, "TEXT", TEXT)
    monkeypatch.setattr(token_numbers, "NUMBERS", (4, 9))
    token_numbers.main(["--rounds", "1"])
    rows = table(capsys)
    assert [row[0] for row in rows] == ["4", "9"] and all(is_number(cell) for row in rows for cell in row)


def test_videos_of_several_lengths_are_measured(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(video_speed, "VIT_S", TINY)
    monkeypatch.setattr(video_speed, "FRAMES", (1, 3))
    video_speed.main(["--rounds", "1"])
    rows = table(capsys)
    assert [row[0] for row in rows] == ["1", "3"] and all(is_number(cell) for row in rows for cell in row)


def test_memory_formats_of_a_cnn_tower_are_compared(monkeypatch, capsys):
    monkeypatch.setattr(cnn_tower, "SHAPE", (2, 3, 64, 64))
    with torch.compiler.set_stance("force_eager"):  # compilation takes a minute
        cnn_tower.main(["--rounds", "1"])
    rows = table(capsys)
    assert len(rows) == 4 and rows[0][2:] == ["1.00", "0.0e+00"]
    assert all(is_number(cell) for row in rows for cell in row[1:3]) and all(float(row[3]) < 1e-5 for row in rows)


@pytest.mark.slow
def test_an_exported_model_is_compared(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tiny_processor(model).save_pretrained(tmp_path)
    export_speed.main(["--model", str(tmp_path), "--rounds", "1"])
    rows = table(capsys)
    assert [row[0] for row in rows] == ["1", "8"]
    assert all(re.fullmatch(r"[\d.]+ s, [\d.]+", cell) for row in rows for cell in row[1:])
    assert all(row[1].endswith(", 1.00") for row in rows)


def test_steps_from_cached_features_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "text_model": save_towers(tmp_path)["text_model"],
        "dataset": save_image_folder(tmp_path / "images"),
        "connector_config": {**TINY, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "cache_features": True,
        "per_device_train_batch_size": 4,
    }
    recipe.write_text(json.dumps(settings))  # JSON is YAML
    monkeypatch.setattr(pretrain, "DEMO_RECIPE", recipe)
    monkeypatch.setattr(cached_features, "VIT_S", ViTConfig(**TINY, image_size=32, patch_size=8))
    monkeypatch.setattr(cached_features, "MERGE_R", 3)
    cached_features.main(["--rounds", "1"])
    out = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) x \|$", out, re.MULTILINE)
    assert [name for name, *_ in rows] == ["images", "cached features"] and rows[0][1] == "1.00"
    assert re.search(r"^\d+\.\d% of the tokens are padding\.$", out, re.MULTILINE)
