"""Answers the questions of a benchmark and scores the answers, with the paper's decoding.

Without arguments: the demo's model on 200 of easy-VQA's 9,673 test questions; `--dataset easy-vqa` takes all. Needs
`.[demo]`.

    python examples/evaluate_vqa.py

A published benchmark, read from its own files, with several processes if you like:

    accelerate launch --num_processes 8 examples/evaluate_vqa.py --model path/to/model --benchmark vqav2 \
        --questions v2_OpenEnded_mscoco_val2014_questions.json --annotations v2_mscoco_val2014_annotations.json \
        --media_dir coco

| benchmark | `--questions` | `--annotations` | `--media_dir` |
|---|---|---|---|
| `vqav2` | `v2_OpenEnded_mscoco_val2014_questions.json` | `v2_mscoco_val2014_annotations.json` | COCO's images |
| `ok-vqa` | `OpenEnded_mscoco_val2014_questions.json` | `mscoco_val2014_annotations.json` | COCO's images |
| `gqa` | `testdev_balanced_questions.json` | | the images |

COCO's images may lie in folders such as `val2014`. Without `--annotations`, as for VQAv2's test splits, the answers
are written as its test server wants them. VQAv2, OK-VQA and GQA are scored as the original's LAVIS
does it: answers of OK-VQA are lemmatised, which needs `.[vqa]`, and those of GQA normalised as VQAv2's. Your own, or a
benchmark's copy on the Hub: `--dataset` and its columns, as in the training scripts, and the `--rule` to score by. A
run that was cut off goes on when it is started again.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import evaluate
from datasets import Dataset

from common.command_line import parse_arguments
from common.data.data_arguments import DataArguments
from common.data.loading import load_held_out
from common.demo.easy_vqa import easy_vqa_questions
from common.evaluation.answers import answer_rows, start_processes
from common.evaluation.benchmark_files import QUESTION_BENCHMARKS, clean_question, question_rows
from common.evaluation.evaluation_arguments import EvaluationArguments, GenerationArguments
from common.evaluation.results import (
    METRICS_FOLDER,
    check_source,
    output_folder,
    source_settings,
    subset_note,
    take,
    write_json,
    write_results,
)
from metrics.vqa_accuracy.lemmatization import lemmatize

DEMO_QUESTIONS = 200  # easy-VQA's answered without arguments; all of them take hours on two cores


@dataclass
class QuestionArguments:
    questions: str | None = field(default=None, metadata={"help": "The benchmark's question file, as published."})
    prompt: str = field(
        default="Question: {} Short answer:", metadata={"help": "What the model is told; {} is the question."}
    )
    prompt_column: str = field(default="question", metadata={"help": "The dataset's column of questions."})
    caption_column: str = field(
        default="answer", metadata={"help": "The dataset's column of answers: one, or several people's."}
    )
    rule: Literal["vqav2", "ok-vqa", "gqa"] | None = field(
        default=None,
        metadata={
            "help": "By whose rule a dataset's answers are scored. Default: GQA's where each question has one right "
            "answer, VQAv2's where it has several people's."
        },
    )
    clean_questions: bool | None = field(
        default=None,
        metadata={"help": "Lower case and fewer marks, as in the paper; default: for benchmarks, not for a dataset."},
    )


@dataclass
class AnswerDecoding(GenerationArguments):
    num_beams: int = field(default=5, metadata={"help": "Beams; 1 is greedy."})
    min_new_tokens: int | None = field(default=1, metadata={"help": "Least length of an answer."})
    max_new_tokens: int = field(default=10, metadata={"help": "Largest length of an answer."})
    length_penalty: float = field(
        default=0.0, metadata={"help": "Power of its length that a beam's score is divided by; BLIP-2 takes -1."}
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    evaluation, questions, generation = parse_arguments(
        EvaluationArguments, QuestionArguments, AnswerDecoding, argv=argv
    )
    name = check_source(evaluation, questions, QUESTION_BENCHMARKS, default="easy-vqa")
    if questions.prompt and "{}" not in questions.prompt:
        raise ValueError(f"`prompt` must hold {{}}, where the question goes, but is {questions.prompt!r}.")
    state = start_processes()
    with state.main_process_first():
        rows, columns, total = load_rows(name, evaluation, questions)
    scored = any(rows["answers"])
    rule = evaluation.benchmark or questions.rule or rule_of(rows["answers"][:])
    metric = load_metric(rule, rows["answers"][:] if scored else []) if state.is_main_process else None
    folder = output_folder(evaluation, name)
    source = source_settings(name, evaluation)
    texts = answer_rows(rows, columns, generation, evaluation, source, folder, state)
    if texts is None:  # the main process does the rest
        return {}

    write_json(folder / "predictions.json", predictions(evaluation.benchmark, rows["id"][:], texts))
    metrics, details = [], {}
    if scored:
        metrics, details = score(metric, rule, texts, rows)
        details["rule"] = rule
    else:
        print(f"{name} has no answers here: {folder}/predictions.json is for its test server.")
    task = ("visual-question-answering", "Visual Question Answering")
    notes = subset_note(len(rows), total)
    return write_results(folder, task, name, metrics, evaluation, len(texts), notes, **details)


def load_rows(
    name: str, evaluation: EvaluationArguments, questions: QuestionArguments
) -> tuple[Dataset, DataArguments, int]:
    """Rows with the columns `id` and `answers`, what their other columns are called, and of how many rows they are."""
    columns = DataArguments(prompt=questions.prompt, prompt_column="question")
    if evaluation.benchmark:
        rows = Dataset.from_list(
            question_rows(name, questions.questions, evaluation.annotations, evaluation.media_dir)
        )
    elif name == "easy-vqa":
        rows = Dataset.from_list(easy_vqa_questions(evaluation.test_split))
    else:
        rows, columns = own_rows(name, evaluation, questions)
    total = len(rows)
    if not evaluation.benchmark and not evaluation.dataset:
        rows = rows.select(range(0, total, total // DEMO_QUESTIONS)).take(DEMO_QUESTIONS)
    rows = take(rows, evaluation.max_samples)
    clean = bool(evaluation.benchmark) if questions.clean_questions is None else questions.clean_questions
    if clean:
        cleaned = [clean_question(question) for question in rows[columns.prompt_column]]
        rows = rows.remove_columns(columns.prompt_column).add_column(columns.prompt_column, cleaned)
    return rows, columns, total


def own_rows(
    name: str, evaluation: EvaluationArguments, questions: QuestionArguments
) -> tuple[Dataset, DataArguments]:
    """The rows of a folder, files or a data set of the Hub, likewise."""
    columns = evaluation.data_arguments(
        name,
        caption_column=questions.caption_column,
        prompt=questions.prompt,
        prompt_column=questions.prompt_column,
    )
    rows = load_held_out(columns)
    for question in rows[questions.prompt_column]:
        if not isinstance(question, str):
            raise ValueError(f"`prompt_column` must hold a question, but a row holds {question!r}.")
    answers = [people(value) for value in rows[questions.caption_column]]
    rows = rows.remove_columns(questions.caption_column).add_column("answers", answers)
    return rows.add_column("id", list(range(len(rows)))), columns


def people(value: Any) -> list[str]:
    """A data set's answer or answers as a list: a text, several, or VQAv2's dicts with an `answer`."""
    answers = [value] if isinstance(value, str) else value or []
    answers = [answer["answer"] if isinstance(answer, dict) else answer for answer in answers]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"`caption_column` must hold an answer or several people's, but a row holds {value!r}.")
    return answers


def predictions(benchmark: str | None, ids: list[int | str], texts: list[str]) -> list[dict[str, Any]]:
    """The answers as the official tool of the benchmark reads them; OK-VQA's lemmatised, as they are scored."""
    if benchmark == "gqa":
        return [{"questionId": row, "prediction": text} for row, text in zip(ids, texts, strict=True)]
    texts = lemmatize(texts) if benchmark == "ok-vqa" else texts
    return [{"question_id": row, "answer": text} for row, text in zip(ids, texts, strict=True)]


def rule_of(answers: list[list[str]]) -> str:
    """By whose rule questions of your own are scored: one right answer each as GQA's, several people's as VQAv2's."""
    return "gqa" if all(len(one) == 1 for one in answers) else "vqav2"


def load_metric(rule: str, references: list[list[str]]) -> evaluate.EvaluationModule:
    """The accuracy metric, tried on answers that are empty: what it lacks is told before hours of answering."""
    if rule == "ok-vqa":
        lemmatize([""])
    metric = evaluate.load(str(METRICS_FOLDER / "vqa_accuracy"), keep_in_memory=True)
    if references:
        metric.compute(predictions=[""] * len(references), references=references, benchmark=rule)
    return metric


def score(
    metric: evaluate.EvaluationModule, rule: str, texts: list[str], rows: Dataset
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Accuracy in percent, of all questions and of each answer type; and of each question type."""
    types = {f"{kind}s": rows[kind][:] for kind in ("answer_type", "question_type") if kind in rows.column_names}
    result = metric.compute(predictions=texts, references=rows["answers"][:], benchmark=rule, **types)
    kind, label = ("accuracy", "Accuracy") if rule == "gqa" else ("vqa_accuracy", "VQA accuracy")
    entries = [{"type": kind, "name": f"{label} [%]", "value": result["accuracy"]}]
    for answer_type, value in result.get("accuracy_per_answer_type", {}).items():
        entry = {"type": kind, "name": f"{label} [%], {answer_type}", "value": value}
        entries.append(entry | {"args": {"answer_type": answer_type}})
    per_question_type = result.get("accuracy_per_question_type")
    return entries, {"accuracy_per_question_type": per_question_type} if per_question_type else {}


if __name__ == "__main__":
    main()
