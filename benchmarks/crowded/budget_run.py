"""Trains a captioner on crowded scenes with several numbers of image tokens, and measures it at each of them."""

import json
import random
import re
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any
from unittest.mock import patch

import pretrain
import torch
from datasets import DatasetDict
from transformers import set_seed

from common.command_line import parse_arguments
from common.data.collator import CaptionCollator
from common.data.feature_cache import cache_split
from common.demo.crowded_scenes import load_crowded_scenes
from common.evaluation.captions import caption_loss, generate_captions
from common.models import build_model
from common.training.trainer import EVLGenTrainer
from common.training.whiten import whiten_vision_projection
from modeling_evlgen import EVLGenForConditionalGeneration, limit_logits, tomeformer
from modeling_evlgen.token_merging import TokenMerging, keep_distinctive
from processing_evlgen import EVLGenProcessor

from ..small_decoder import prepare_small_decoder, train_from_scratch, words
from ..timing import count_flops
from .connector_settings import ALL_TOKENS, BUDGETS, RANDOM, VIEW, connector_fields
from .scene_texts import KINDS, SceneTexts, list_texts

BATCH = 50  # of held-out texts
REFERENCE_BUDGET = 16  # tokens of the step whose operations are counted
STRIDE = 16  # pixels of a token along each side
VIEW_SIZE = 224  # pixels


@dataclass(frozen=True)
class BudgetRun:
    """The settings of one run."""

    method: str
    size: int = 448  # pixels
    textured: bool = True
    seed: int = 0
    budget: int | None = None  # None: each batch draws one of all budgets
    steps: int = 600

    @property
    def name(self) -> str:
        background = "textured" if self.textured else "plain"
        return f"{self.method}.{self.size}.{background}.budget-{self.budget or 'any'}.seed{self.seed}.{self.steps}"

    @property
    def budgets(self) -> tuple[int, ...]:
        """The numbers of tokens that the run is trained for."""
        if self.method == ALL_TOKENS:
            return ((self.size // STRIDE) ** 2,)
        return BUDGETS if self.budget is None else (self.budget,)


class BudgetCollator(CaptionCollator):
    """Draws one of `budgets` for each batch of training. Held-out batches have `processor.num_image_tokens`."""

    budgets: tuple[int, ...] = BUDGETS

    def draw_budget(self, rows: list[dict[str, Any]]) -> int | None:
        if not self.training or len(self.budgets) == 1:
            return None
        with self.seeded(rows[0], [(row["question"], row["answer"]) for row in rows]):
            return random.choice(self.budgets)


def keep_random(x: torch.Tensor, num_output_tokens: int, class_token: bool = False) -> TokenMerging:
    """Keeps random tokens, and the mean of all others."""
    return keep_distinctive(torch.randn_like(x), num_output_tokens, class_token)


def train(run: BudgetRun) -> dict[str, Any]:
    """Trains a run. Returns its settings, its cost and the held-out figures at each budget."""
    choice = patch.object(tomeformer, "keep_distinctive", keep_random) if run.method == RANDOM else nullcontext()
    with choice, tempfile.TemporaryDirectory() as folder:
        return _train(run, folder)


def _train(run: BudgetRun, folder: str) -> dict[str, Any]:
    scenes = load_crowded_scenes(run.size, run.textured)
    texts = list_texts(scenes)
    model, processor, arguments = build(run, texts, folder)
    model_args, _, data_args, _, training_args = arguments
    splits = load_splits(scenes, texts, model, CaptionCollator(processor, data_args, training=False))
    whiten_vision_projection(model, processor, splits["train"].features, data_args, model_args.whitening_images)
    collator = BudgetCollator(processor, data_args, training=True, seed=run.seed)
    collator.budgets = run.budgets
    budget = None if run.method == ALL_TOKENS else run.budget or REFERENCE_BUDGET
    batch = collator.encode(collator.read_examples([splits["train"][row] for row in range(16)]), budget=budget)
    flops = count_flops(lambda: model(**limit_logits(batch))["loss"].backward())
    model.zero_grad()
    trainer = EVLGenTrainer(
        model=model.train(),
        args=training_args,
        train_dataset=splits["train"],
        data_collator=collator,
        processing_class=processor,
    )
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    return {
        "run": asdict(run),
        "connector_parameters": sum(weight.numel() for weight in model.connector.parameters()),
        "flops_per_step": flops,
        "cpu_seconds_per_step": round(seconds / run.steps, 3),
        "held_out": {budget: measure(trainer, splits["test"], arguments, budget) for budget in run.budgets},
    }


def build(
    run: BudgetRun, texts: DatasetDict, folder: str
) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor, tuple[Any, ...]]:
    """A fresh captioner with the arguments that `examples/pretrain.py` would have. Its text decoder is trained."""
    size = VIEW_SIZE if run.method == VIEW else run.size
    connector, fields = connector_fields(run.method, size // STRIDE)
    all_texts = [text for split in texts.values() for name in ("question", "answer") for text in split[name]]
    arguments = {
        "connector": connector,
        "connector_config": json.dumps(fields),
        "image_size": size,
        "text_model": prepare_small_decoder("crowded-decoder", all_texts),
        "dataset": "crowded-scenes",
        "prompt_column": "question",
        "caption_column": "answer",
        "chat_template": "",
        "max_new_tokens": 40,
        "max_steps": run.steps,
        "warmup_steps": 50,
        "seed": run.seed,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 50,
        "output_dir": folder,
    }
    argv = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    parsed = parse_arguments(*pretrain.ARGUMENTS, argv=argv, recipe=pretrain.DEMO_RECIPE)
    set_seed(run.seed)
    model, processor = build_model(*parsed[:2])
    if len(run.budgets) > 1:
        model.config.image_token_range = processor.image_token_range = [min(BUDGETS), max(BUDGETS)]
    elif run.budget is not None:
        model.config.image_token_range = processor.image_token_range = [run.budget] * 2
        processor.num_image_tokens = run.budget
    train_from_scratch(model.language_model)
    return model, processor, parsed


def load_splits(
    scenes: DatasetDict, texts: DatasetDict, model: EVLGenForConditionalGeneration, views: CaptionCollator
) -> dict[str, SceneTexts]:
    """The texts of each split, with the features of each scene."""
    views.data_args = replace(views.data_args, caption_column="caption", prompt_column=None)
    return {name: SceneTexts(texts[name], cache_split(model, scenes[name], views)) for name in scenes}


def measure(trainer: EVLGenTrainer, test: SceneTexts, arguments: tuple[Any, ...], budget: int) -> dict[str, Any]:
    """Held-out figures at a budget, and for each text whether it is right, as a string of 0 and 1."""
    processor, model = trainer.processing_class, trainer.model
    _, _, data_args, generation_args, _ = arguments
    processor.num_image_tokens = budget
    collator = CaptionCollator(processor, data_args, training=False)
    captions = SceneTexts(test.texts.filter(lambda row: row["kind"] == "caption"), test.features)
    loss = caption_loss(model, captions, collator, BATCH, torch.float32)
    generated = generate_captions(model, test, collator, generation_args, BATCH, torch.float32)
    answers = list(zip(test.texts["kind"], generated, test.texts["answer"], strict=True))
    right = [words(text) == words(truth) for _, text, truth in answers]
    by_kind = defaultdict(list)
    for (kind, _, _), is_right in zip(answers, right, strict=True):
        by_kind[kind].append(is_right)
    names = [names_f1(text, truth) for kind, text, truth in answers if kind == "caption"]
    return {
        "loss": round(loss, 4),
        "names": round(mean(names), 4),
        **{kind: round(mean(by_kind[kind]), 4) for kind in KINDS},
        "right": "".join(str(int(is_right)) for is_right in right),
    }


def names_f1(text: str, truth: str) -> float:
    """F1 of the named drawings, 0 to 1: how many of a caption's names are true, and how many true ones it has."""
    named, true = _count_names(text), _count_names(truth)
    return 2 * (named & true).total() / max(1, named.total() + true.total())


def _count_names(text: str) -> Counter[str]:
    names = re.split(r"\b(?:an?|and|above)\b", " ".join(words(text)))
    return Counter(name.strip() for name in names if name.strip())
