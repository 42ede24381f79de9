"""Answers the questions of a benchmark and scores the answers, with the paper's decoding.

Without arguments, it evaluates the demo's model on 200 of easy-VQA's 9,673 test questions. `--dataset easy-vqa` takes
all of them. It needs `.[demo]`.

    python examples/evaluate_vqa.py

A published benchmark is read from its own files, here by several processes:

    accelerate launch --num_processes 8 examples/evaluate_vqa.py --model path/to/model --benchmark vqav2 \
        --questions v2_OpenEnded_mscoco_val2014_questions.json --annotations v2_mscoco_val2014_annotations.json \
        --media_dir coco

docs/evaluate.md names the files of each benchmark, and its rules, which are those of LAVIS. Your own data, or a
benchmark's copy on the Hub, are given by `--dataset` and its columns, as in the training scripts, and by the `--rule`
that scores them. A run that was interrupted goes on when it is started again.
"""

import common.processes  # isort: skip  # first, since it sets how PyTorch's threads wait

from dataclasses import dataclass
from typing import Any, Literal

import evaluate
from datasets import Dataset
from transformers.hf_argparser import HfArg

from common.arguments import DataArguments, EvaluationArguments, GenerationArguments, parse_arguments
from common.demo.easy_vqa import easy_vqa_questions
from common.evaluation.answer_folder import METRICS_FOLDER, check_source, output_folder, run_folder, write_results
from common.evaluation.answers import answer_rows, load_dataset_rows, start_processes
from common.evaluation.benchmark_files import QUESTION_BENCHMARKS, clean_question, question_rows
from metrics.vqa_accuracy.lemmatization import lemmatize

TYPE_COLUMNS = ("answer_type", "question_type")
DEMO_QUESTIONS = 200  # of easy-VQA, without arguments; all of them take hours on two cores


@dataclass
class QuestionArguments:
    questions: str | None = HfArg(default=None, help="The benchmark's question file, as published.")
    prompt: str = HfArg(default="Question: {} Short answer:", help="The prompt; the question replaces {}.")
    prompt_column: str = HfArg(default="question", help="The dataset's column of questions.")
    caption_column: str = HfArg(default="answer", help="The dataset's column of answers, one or several in a row.")
    rule: Literal["vqav2", "ok-vqa", "gqa"] | None = HfArg(
        default=None, help="Rule of a dataset's scores; default: gqa if each question has one answer, else vqav2."
    )
    clean_questions: bool | None = HfArg(default=None, help="Clean them as in the paper; default: only a benchmark's.")


@dataclass
class AnswerDecoding(GenerationArguments):
    num_beams: int = HfArg(default=5, help="Beams; 1 is greedy.")
    min_new_tokens: int | None = HfArg(default=1, help="Smallest length of an answer.")
    max_new_tokens: int = HfArg(default=10, help="Largest length of an answer.")
    length_penalty: float = HfArg(default=0.0, help="Exponent of the length that divides a beam's score; BLIP-2: -1.")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    evaluation_args, question_args, generation_args = parse_arguments(
        EvaluationArguments, QuestionArguments, AnswerDecoding, argv=argv
    )
    name = check_source(evaluation_args, question_args, QUESTION_BENCHMARKS, default="easy-vqa")
    if question_args.prompt and "{}" not in question_args.prompt:
        raise ValueError(f"`prompt` must hold {{}} in place of the question, but is {question_args.prompt!r}.")
    state = start_processes()
    folder = output_folder(evaluation_args, name)
    with run_folder(folder, state):
        with state.main_process_first():
            rows, data_args, total = load_rows(name, evaluation_args, question_args)
        references = rows["answers"][:]
        default_rule = "gqa" if all(len(answers) == 1 for answers in references) else "vqav2"
        rule = evaluation_args.benchmark or question_args.rule or default_rule
        references = references if any(references) else None
        metric = load_metric(rule, references) if state.is_main_process else None
        texts = answer_rows(name, rows, data_args, generation_args, evaluation_args, folder, state)
        if texts is None:  # the main process alone scores the answers and writes the results
            return {}
        metrics, details = [], {}
        if references:
            metrics, details = score(metric, rule, texts, rows)
            details["rule"] = rule
        submitted = predictions(evaluation_args.benchmark, rows["id"][:], texts)
        task = ("visual-question-answering", "Visual Question Answering")
        return write_results(folder, task, name, submitted, metrics, evaluation_args, total, [], **details)


def load_rows(
    name: str, evaluation_args: EvaluationArguments, question_args: QuestionArguments
) -> tuple[Dataset, DataArguments, int]:
    """Loads the rows, with the columns `id` and `answers`, names their other columns, and counts the whole split."""
    data_args = DataArguments(prompt=question_args.prompt, prompt_column="question")
    if evaluation_args.benchmark:
        files = question_args.questions, evaluation_args.annotations, evaluation_args.media_dir
        rows = Dataset.from_list(question_rows(name, *files))
    elif name == "easy-vqa":
        rows = Dataset.from_list(easy_vqa_questions(evaluation_args.test_split))
    else:
        prompt = {"prompt": question_args.prompt, "prompt_column": question_args.prompt_column}
        rows, data_args = load_dataset_rows(name, evaluation_args, "answers", question_args.caption_column, **prompt)
    column = data_args.prompt_column
    for question in rows[column]:
        if not isinstance(question, str):
            raise ValueError(f"`prompt_column` must hold a question, but a row holds {question!r}.")
    total = len(rows)
    if not evaluation_args.benchmark and not evaluation_args.dataset:
        # Spread over the split, so that all types of questions are among them.
        rows = rows.select(range(0, total, total // DEMO_QUESTIONS)).take(DEMO_QUESTIONS)
    rows = rows.select(range(min(len(rows), evaluation_args.max_test_samples or total)))
    clean = question_args.clean_questions
    if bool(evaluation_args.benchmark) if clean is None else clean:
        cleaned = [clean_question(question) for question in rows[column]]
        rows = rows.remove_columns(column).add_column(column, cleaned)
    return rows, data_args, total


def predictions(benchmark: str | None, ids: list[int | str], texts: list[str]) -> list[dict[str, Any]]:
    """The answers in the form of the benchmark's official tool; those to OK-VQA are lemmatised, as in scoring."""
    if benchmark == "gqa":
        return [{"questionId": row, "prediction": text} for row, text in zip(ids, texts, strict=True)]
    texts = lemmatize(texts) if benchmark == "ok-vqa" else texts
    return [{"question_id": row, "answer": text} for row, text in zip(ids, texts, strict=True)]


def load_metric(rule: str, references: list[list[str]] | None) -> evaluate.EvaluationModule:
    """Loads the accuracy metric and tries it on empty answers, so that it does not fail after hours of answering."""
    if rule == "ok-vqa":
        lemmatize([""])
    metric = evaluate.load(str(METRICS_FOLDER / "vqa_accuracy"), keep_in_memory=True)
    if references:
        metric.compute(predictions=[""] * len(references), references=references, benchmark=rule)
    return metric


def score(
    metric: evaluate.EvaluationModule, rule: str, texts: list[str], rows: Dataset
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Computes accuracies in percent: of all questions and each answer type; of each question type, as `details`."""
    types = {f"{column}s": rows[column][:] for column in TYPE_COLUMNS if column in rows.column_names}
    result = metric.compute(predictions=texts, references=rows["answers"][:], benchmark=rule, **types)
    key, name = ("accuracy", "Accuracy") if rule == "gqa" else ("vqa_accuracy", "VQA accuracy")
    entries = [{"type": key, "name": f"{name} [%]", "value": result["accuracy"]}]
    for answer_type, value in result.get("accuracy_per_answer_type", {}).items():
        entry = {"type": key, "name": f"{name} [%], {answer_type}", "value": value}
        entries.append(entry | {"args": {"answer_type": answer_type}})
    per_question_type = result.get("accuracy_per_question_type")
    return entries, {"accuracy_per_question_type": per_question_type} if per_question_type else {}


if __name__ == "__main__":
    common.processes.run_script(main)
