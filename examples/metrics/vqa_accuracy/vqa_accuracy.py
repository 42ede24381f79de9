"""Accuracy of short answers: VQAv2's official rule, and LAVIS's rules for OK-VQA and GQA."""

from collections import defaultdict
from statistics import fmean

import datasets
import evaluate

from .answer_normalization import gqa_score, vqa_score
from .lemmatization import lemmatize

_CITATION = "Goyal et al., Making the V in VQA Matter, CVPR 2017"

_DESCRIPTION = """\
Accuracy of short answers to questions about images, as LAVIS computes it. VQAv2, by the official rule:
min(1, matches / 3), averaged over leaving out each person once, after the official normalisation; matches are people
with the same answer. OK-VQA: the same with lemmatised predictions. GQA: exact match of the prediction, normalised as
for VQAv2, with the one right answer.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): The model's answers, as generated.
    references (`list[list[str]]`): People's answers to each question: 10 for VQAv2 and OK-VQA, 1 for GQA.
    benchmark (`str`): The benchmark whose rule applies: "vqav2" (the default), "ok-vqa" or "gqa".
    answer_types (`list[str]`, *optional*): The type of each answer, e.g. "yes/no", "number" and "other".
    question_types (`list[str]`, *optional*): The type of each question, e.g. "how many".

Returns:
    accuracy (`float`): Mean over all questions, in percent; the official tool rounds it to two digits.
    num_questions (`int`): The number of questions.
    accuracy_per_answer_type, accuracy_per_question_type (`dict[str, float]`): The accuracy of each type, if types are
        given.

Examples:

    >>> metric = evaluate.load("examples/metrics/vqa_accuracy")
    >>> people = ["blue"] * 2 + ["navy"] * 8
    >>> metric.compute(predictions=["Blue."], references=[people], answer_types=["other"])
    {'accuracy': 60.0, 'num_questions': 1, 'accuracy_per_answer_type': {'other': 60.0}}
"""

BENCHMARKS = ("vqav2", "ok-vqa", "gqa")


class VQAAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(predictions=text, references=datasets.Sequence(text)),
            reference_urls=["https://visualqa.org/evaluation.html", "https://github.com/GT-Vision-Lab/VQA"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[list[str]],
        benchmark: str = "vqav2",
        answer_types: list[str] | None = None,
        question_types: list[str] | None = None,
    ) -> dict[str, float | int | dict[str, float]]:
        if benchmark not in BENCHMARKS:
            raise ValueError(f"`benchmark` must be one of {', '.join(BENCHMARKS)}, but is {benchmark!r}.")
        _check_references(references, benchmark)
        if benchmark == "ok-vqa":
            predictions = lemmatize(predictions)
        pairs = zip(predictions, references, strict=True)
        gqa = benchmark == "gqa"
        scores = [gqa_score(answer, people[0]) if gqa else vqa_score(answer, people) for answer, people in pairs]
        results = {"accuracy": 100 * fmean(scores), "num_questions": len(scores)}
        for name, types in (("answer_type", answer_types), ("question_type", question_types)):
            if types is not None:
                results[f"accuracy_per_{name}"] = _mean_per_type(f"{name}s", types, scores)
        return results


def _check_references(references: list[list[str]], benchmark: str) -> None:
    for index, answers in enumerate(references):
        if benchmark == "gqa" and len(answers) != 1:
            raise ValueError(f"`references` entry {index} must hold one answer for gqa, but holds {len(answers)}.")
        if benchmark != "gqa" and len(answers) < 2:
            raise ValueError(
                f"`references` entry {index} must hold the answers of at least 2 people for {benchmark}, but holds "
                f'{len(answers)}. With one right answer for each question, take benchmark="gqa".'
            )


def _mean_per_type(argument: str, types: list[str], scores: list[float]) -> dict[str, float]:
    if len(types) != len(scores):
        raise ValueError(f"`{argument}` must hold {len(scores)} types, one for each question, but holds {len(types)}.")
    grouped = defaultdict(list)
    for name, score in zip(types, scores, strict=True):
        grouped[name].append(score)
    return {name: 100 * fmean(scores) for name, scores in sorted(grouped.items())}
