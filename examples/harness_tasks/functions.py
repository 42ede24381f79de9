"""What the tasks for lm-eval and lmms-eval share: our scripts' prompts and metrics."""

from pathlib import Path
from typing import Any

import evaluate
from PIL import Image

METRICS = Path(__file__).resolve().parents[1] / "metrics"
Pair = tuple[str, str]  # a generated text, and the right one


def images(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["image"].convert("RGB")]


def question(doc: dict[str, Any]) -> str:
    return f"Question: {doc['question']} Short answer:"


def no_prompt(doc: dict[str, Any]) -> str:
    return ""


def answer(doc: dict[str, Any], results: list[str]) -> dict[str, Pair]:
    return {"accuracy": (results[0].strip(), doc["answer"])}


def caption(doc: dict[str, Any], results: list[str]) -> dict[str, Pair]:
    return {"cider": (results[0].strip(), doc["caption"])}


def accuracy(pairs: list[Pair]) -> float:
    return compute("vqa_accuracy", pairs, benchmark="gqa")["accuracy"]


def cider(pairs: list[Pair]) -> float:
    return compute("coco_caption", pairs, metrics=["cider"])["cider"]


def compute(metric: str, pairs: list[Pair], **kwargs: Any) -> dict[str, Any]:
    predictions, references = zip(*pairs, strict=True)
    module = evaluate.load(str(METRICS / metric), keep_in_memory=True)
    return module.compute(predictions=list(predictions), references=[[text] for text in references], **kwargs)
