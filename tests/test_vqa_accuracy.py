"""The metric for short answers: the official normalisation with its oddities, the three rules, loading by path."""

import evaluate
import pytest

from metrics.vqa_accuracy import lemmatization
from metrics.vqa_accuracy.answer_normalization import (
    CONTRACTIONS,
    gqa_score,
    normalize_prediction,
    normalize_references,
    process_digits_and_articles,
    process_punctuation,
    vqa_score,
)

from .helpers import ROOT

METRIC = str(ROOT / "examples" / "metrics" / "vqa_accuracy")


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(METRIC, keep_in_memory=True)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("yes", "yes"),
        ("yes!", "yes "),  # inside or at the end of a word: a space
        ("red, blue", "red blue"),  # beside a space: nothing
        ("t-shirt", "t shirt"),
        ("- 5", " 5"),
        ("10,000", "10000"),  # a comma between digits: every mark goes
        ("3.5", "3.5"),
        (".5", ".5"),
        ("1.", "1"),
        ("e.g.", "eg"),
        ("a.5", "a.5"),  # before a digit, though not behind one
        ("mr. smith", "mr smith"),
        ("7:30", "7:30"),
        ("dog's", "dog's"),
        ("what?! (yes)", "what  yes "),  # each mark by itself, by what the whole text holds
        ("." * 40, "." * 8),  # 32 periods at most
    ],
)
def test_punctuation_is_removed_as_in_the_official_tool(answer, expected):
    assert process_punctuation(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A Red  car", "red car"),
        ("none", "0"),
        ("Ten dogs", "10 dogs"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # looked for with a capital I, when all is in lower case
        ("lets", "lets"),
        ("oclock", "o'clock"),
    ],
)
def test_digits_articles_and_contractions_are_the_official_tools(answer, expected):
    assert process_digits_and_articles(answer) == expected


def test_the_contractions_are_those_of_the_official_tool():
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert "shes" not in CONTRACTIONS and "its" not in CONTRACTIONS


def test_predictions_lose_line_breaks_before_all_else():
    assert normalize_prediction(" the red,\ncar\t") == "red car"  # the comma now stands beside a space


def test_references_are_processed_only_where_they_differ():
    assert normalize_references(["t-shirt"] * 10) == ["t-shirt"] * 10
    assert normalize_references(["t-shirt", "shirt"]) == ["t shirt", "shirt"]
    assert vqa_score("t-shirt", ["t-shirt"] * 10) == 0.0  # as in the official tool
    assert vqa_score("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1.0
    assert vqa_score("Blue", ["Blue"] * 10) == 0.0  # published answers are in lower case


@pytest.mark.parametrize(
    ("matches", "expected"),
    # These are the scores of the official page: 0.3, 0.6, 0.9 and 1.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_each_person_is_left_out_once(matches, expected):
    answers = ["yes"] * matches + ["no"] * (10 - matches)
    assert vqa_score("yes", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [("Blue.", "blue", 1), ("the man", "man", 1), ("two", "2", 1), ("t-shirt", "t-shirt", 0), ("a", "a", 0)],
)
def test_gqa_normalises_the_prediction_alone(prediction, answer, expected):
    assert gqa_score(prediction, answer) == expected


def test_the_metric_is_loaded_by_path_and_gives_accuracies_by_type(metric):
    results = metric.compute(
        predictions=["Blue.", "yes", "two"],
        references=[["blue"] * 2 + ["navy"] * 8, ["yes"] * 10, ["3"] * 10],
        answer_types=["other", "yes/no", "number"],
        question_types=["what", "is", "what"],
    )
    assert results["accuracy"] == pytest.approx(100 * 1.6 / 3) and results["num_questions"] == 3
    assert results["accuracy_per_answer_type"] == pytest.approx({"number": 0, "other": 60, "yes/no": 100})
    assert results["accuracy_per_question_type"] == pytest.approx({"is": 100, "what": 30})
    assert metric.compute(predictions=["Two"], references=[["2"]], benchmark="gqa")["accuracy"] == 100


def test_ok_vqa_lemmatises_predictions(metric):
    pytest.importorskip("spacy", reason="needs the vqa extra")
    arguments = {"predictions": ["two dogs running"], "references": [["2 dog run"] * 10]}
    assert metric.compute(**arguments, benchmark="ok-vqa")["accuracy"] == 100
    assert metric.compute(**arguments)["accuracy"] == 0
    # Nouns and verbs alone: "are" is an auxiliary here, and stays.
    assert lemmatization.lemmatize(["the dogs are running", "it's surfing"]) == ["the dog are run", "it 's surf"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "vqa"}, "`benchmark` must be one of vqav2, ok-vqa, gqa, but is 'vqa'"),
        ({"references": [["yes"]]}, "`references` entry 0 must hold .* at least 2 people"),
        ({"benchmark": "gqa"}, "`references` entry 0 must hold one answer for gqa, but holds 10"),
        ({"answer_types": ["other"] * 2}, "`answer_types` must hold 1 types, one for each question, but holds 2"),
    ],
)
def test_inputs_without_a_score_are_refused(changes, message, metric):
    with pytest.raises(ValueError, match=message):
        metric.compute(**{"predictions": ["yes"], "references": [["yes"] * 10], **changes})
