"""Runs of the evaluation scripts: answers of a model, kills, two processes, resumed runs and written results."""

import json
import shutil
from pathlib import Path

import evaluate_captioning
import evaluate_vqa
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants

from common.demo import scenes
from common.demo.easy_vqa import easy_vqa_questions
from common.evaluation import answers
from common.evaluation.answer_folder import read_answers
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from .evaluation import FixedAnswers, draw, options, read_json, save_work, value, vqav2
from .helpers import demo_packages_or_skip, generate_new, save_image_folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return save_work(tmp_path_factory.mktemp("work"))


def save_questions(folder, *rows):
    """Saves a parquet file of questions; returns the arguments that name it."""
    draw(folder / "a.png", "red")
    Dataset.from_list([{"image": str(folder / "a.png"), **row} for row in rows]).to_parquet(folder / "test.parquet")
    return {"dataset": "parquet", "data_files": json.dumps({"test": str(folder / "test.parquet")})}


def test_easy_vqa_is_answered_by_the_model(work, tmp_path):
    """A real model: its answer in a batch is that of `generate` for the single question."""
    demo_packages_or_skip()
    changes = {"dataset": "easy-vqa", "max_test_samples": 6}
    results = evaluate_vqa.main(options(work, tmp_path / "out", **changes))
    assert results["num_rows"] == 6 and 0 <= value(results, "Accuracy [%]") <= 100
    evaluate_vqa.main(options(work, tmp_path / "single", **changes, batch_size=1))
    together, single = (read_answers(tmp_path / name / "answers.jsonl") for name in ("out", "single"))
    assert together == single and list(together) == list(range(6)) and len(set(together.values())) > 1
    model = EVLGenForConditionalGeneration.from_pretrained(work / "model")
    processor = EVLGenProcessor.from_pretrained(work / "model")
    row = easy_vqa_questions("test")[3]
    inputs = processor(images=row["image"], text=f"Question: {row['question']} Short answer:")
    (new,) = generate_new(model, inputs, num_beams=5, min_new_tokens=1, max_new_tokens=10, length_penalty=0.0)
    assert together[3] == processor.decode(new, skip_special_tokens=True).strip()


def test_without_arguments_the_demos_data_is_taken(work, tmp_path, monkeypatch):
    demo_packages_or_skip(tmp_path / "hf_home")
    FixedAnswers(monkeypatch, ["red"] * 200)
    results = evaluate_vqa.main(options(work, tmp_path / "vqa"))
    ids = [entry["question_id"] for entry in read_json(tmp_path / "vqa" / "predictions.json")]
    assert results["dataset"]["type"] == "easy-vqa" and len(ids) == 200 and max(ids) > 9000
    assert results["notes"][0].startswith("Only 200 of 9673 rows were answered")
    assert value(results, "Accuracy [%], color") > 0 and value(results, "Accuracy [%], yes/no") == 0

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setattr(scenes, "TRAIN_SCENES", 2)
    monkeypatch.setattr(scenes, "TEST_SCENES", 6)
    fixed = FixedAnswers(monkeypatch, ["a frog above an owl"] * 6)
    results = evaluate_captioning.main(options(work, tmp_path / "captions"))
    assert results["dataset"]["type"] == "openmoji-scenes" and results["num_rows"] == 6
    assert fixed.generation_args.min_new_tokens == 1  # short captions are right there


def test_a_data_set_is_captioned(work, tmp_path):
    folder = save_image_folder(tmp_path / "images")
    arguments = {"dataset": folder, "num_beams": 2, "max_new_tokens": 6}
    results = evaluate_captioning.main(options(work, tmp_path / "out", **arguments))
    half = evaluate_captioning.main(options(work, tmp_path / "half", **arguments, dtype="bfloat16", num_workers=1))
    assert half["num_rows"] == 8 and half["settings"]["dtype"] == "bfloat16"
    assert all(isinstance(text, str) for text in read_answers(tmp_path / "half" / "answers.jsonl").values())
    assert results["num_rows"] == 8 and results["settings"]["min_new_tokens"] == 1  # short captions are allowed
    assert results["dataset"] == {"type": folder, "name": "images", "split": "test"}


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ([{"answer": "red", "answer_id": 1}, {"answer": "red", "answer_id": 2}], "VQA accuracy [%]"),
        (["red", "red", "blue"], "VQA accuracy [%]"),
        (["red"], "Accuracy [%]"),
        ("red", "Accuracy [%]"),
    ],
)
def test_questions_of_a_data_set_are_answered(column, name, work, tmp_path, monkeypatch):
    """With one answer each they are scored as GQA's, with several people's answers as VQAv2's."""
    files = save_questions(tmp_path, *[{"q": "What Color?", "a": column}] * 2)
    fixed = FixedAnswers(monkeypatch, ["red", "blue"])
    columns = {"image_column": "image", "prompt_column": "q", "caption_column": "a"}
    results = evaluate_vqa.main(options(work, tmp_path / "out", **files, **columns))
    expected = {1: 50, 2: 100 * (1 / 3) / 2, 3: 100 * (4 / 9 + 2 / 9) / 2}[len(column) if column != "red" else 1]
    assert value(results, name) == pytest.approx(expected)
    assert fixed.prompts[0].endswith("Question: What Color? Short answer:")  # as it is in training


def test_a_dataset_is_scored_by_the_rule_that_is_named(work, tmp_path, monkeypatch):
    """A copy of OK-VQA on the Hub is scored with lemmas. By default several answers are scored as VQAv2's."""
    pytest.importorskip("spacy", reason="needs the vqa extra")
    files = save_questions(tmp_path, {"question": "What sport is this?", "answer": ["race"] * 10})
    fixed = FixedAnswers(monkeypatch, ["racing"])
    scores = {}
    for rule in ({}, {"rule": "ok-vqa"}):
        results = evaluate_vqa.main(options(work, tmp_path / "out", **files, **rule))
        scores[results["rule"]] = value(results, "VQA accuracy [%]")
        fixed.texts = []  # a finished run is scored again without the model
    assert scores == {"vqav2": 0, "ok-vqa": 100}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 3}, "num_beams was 5 and is 3"),
        ({"clean_questions": False}, "rows was '.*' and is"),
        ({"media_dir": "copy"}, "media_dir was '.*coco' and is '.*copy'"),
    ],
)
def test_other_settings_do_not_mix_with_old_answers(changes, message, work, tmp_path, monkeypatch):
    FixedAnswers(monkeypatch, ["red"] * 4)
    evaluate_vqa.main(options(work, tmp_path, **vqav2(work)))
    if "media_dir" in changes:
        changes = {"media_dir": shutil.copytree(work / "coco", tmp_path / "copy")}
    with pytest.raises(ValueError, match=message):
        evaluate_vqa.main(options(work, tmp_path, **vqav2(work, **changes)))


def test_other_data_do_not_mix_with_old_answers(work, tmp_path, monkeypatch):
    """The rows have the same ids, but other images: this is noticed in every form of a data set."""
    FixedAnswers(monkeypatch, ["a red circle"] * 8)
    folder = Path(save_image_folder(tmp_path / "images"))
    shutil.copytree(folder, tmp_path / "other")
    shutil.copytree(folder / "test", folder / "validation")

    def refused(message, **changes):
        with pytest.raises(ValueError, match=f"has answers from other settings: .*{message}"):
            evaluate_captioning.main(options(work, tmp_path / "out", **changes))

    evaluate_captioning.main(options(work, tmp_path / "out", dataset=folder))
    refused("dataset was '.*images' and is '.*other'", dataset=tmp_path / "other")
    refused("test_split was 'test' and is 'validation'", dataset=folder, test_split="validation")
    draw(sorted((folder / "test").glob("*.png"))[0], "purple")  # in the place of another
    refused("images was '[0-9a-f]+' and is", dataset=folder)


def test_answers_of_unknown_settings_are_refused(work, tmp_path, monkeypatch):
    FixedAnswers(monkeypatch, ["red"] * 8)
    arguments = options(work, tmp_path, **vqav2(work))
    evaluate_vqa.main(arguments)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"`output_dir`: .*settings\.json is broken"):
        evaluate_vqa.main(arguments)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"`output_dir`: .*no settings"):
        evaluate_vqa.main(arguments)


def test_another_model_of_the_same_name_is_noticed(work, tmp_path, monkeypatch):
    FixedAnswers(monkeypatch, ["red"] * 8)
    shutil.copytree(work / "model", tmp_path / "model")
    given = options(work, tmp_path / "out", **vqav2(work, model=tmp_path / "model"))
    evaluate_vqa.main(given)
    model = EVLGenForConditionalGeneration.from_pretrained(work / "model")
    with torch.no_grad():
        model.language_projection.weight.neg_()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"weights was '.*' and is '"):
        evaluate_vqa.main(given)
    shutil.copytree(work / "model", tmp_path / "model", dirs_exist_ok=True)
    config = read_json(tmp_path / "model" / "config.json")
    config["image_token_range"] = [5, 17]  # the same weights, but other answers
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"configuration was '.*' and is '"):
        evaluate_vqa.main(given)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": None}, "`caption_column` must .* None"),
        ({"question": None}, "`prompt_column` must .* None"),
        ({"answer": ["red", "blue"]}, "at least 2 people"),
        ({"image": "b.png"}, r"`image_column` names files that are missing, 1 in all: .*/b\.png\."),
    ],
)
def test_questions_without_an_answer_or_image_are_refused_before_loading(row, message, work, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "load_answering_model", None)
    good = {"question": "what?", "answer": ["red"] if isinstance(row.get("answer"), list) else "red"}
    files = save_questions(tmp_path, good, good | row)
    with pytest.raises(ValueError, match=message):
        evaluate_vqa.main(options(work, tmp_path / "out", **files))


def test_a_broken_image_and_a_broken_line_are_named(work, tmp_path):
    shutil.copytree(work / "coco", tmp_path / "coco")
    (tmp_path / "coco" / "val2014" / "COCO_val2014_000000393225.jpg").write_bytes(b"no image")
    given = options(work, tmp_path / "out", **vqav2(work, media_dir=tmp_path / "coco"))
    with pytest.raises(ValueError, match=r"row 393225000: .*COCO_val2014_000000393225\.jpg' cannot be read"):
        evaluate_vqa.main(given)
    (tmp_path / "out" / "answers.jsonl").write_text('{"id": 262148000}\n{"id": 1, "text": ""}\n')
    with pytest.raises(ValueError, match=r"`output_dir`: line 1 of .*answers\.jsonl is broken: 'text'"):
        evaluate_vqa.main(given)
    (tmp_path / "out" / "answers.jsonl").write_text('{"id": 1, "text": ""}\n')
    with pytest.raises(ValueError, match=r"`output_dir`: .*answers\.jsonl answers the row 1, which is none"):
        evaluate_vqa.main(given)


def test_arguments_come_from_a_yaml_file_too(work, tmp_path, monkeypatch):
    fixed = FixedAnswers(monkeypatch, ["red"] * 4)
    files = {name: str(path) for name, path in vqav2(work).items()}
    (tmp_path / "recipe.yaml").write_text(json.dumps({"num_beams": 2.5}))  # JSON is YAML
    with pytest.raises(ValueError, match=r"`num_beams` must be an integer of 1 or more, but is 2\.5"):
        evaluate_vqa.main(["--config", str(tmp_path / "recipe.yaml")])
    (tmp_path / "recipe.yaml").write_text(json.dumps({**files, "num_beams": 2, "max_new_tokens": 4}))
    evaluate_vqa.main(options(work, tmp_path / "out", config=tmp_path / "recipe.yaml", num_beams=3))
    assert (fixed.generation_args.num_beams, fixed.generation_args.max_new_tokens) == (3, 4)
    assert len(read_json(tmp_path / "out" / "predictions.json")) == 4
