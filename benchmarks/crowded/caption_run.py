"""Trains the recipe for crowded images with its language model, and reads its captions."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pretrain

from common.data.collator import CaptionCollator
from common.demo.crowded_scenes import list_things
from common.evaluation.captions import evaluate_captions
from common.training.trainer import EVLGenTrainer

from ..pretraining import parse_recipe, prepare_training
from .budget_run import STRIDE
from .connector_settings import BUDGETS, connector_fields

RECIPE = Path(pretrain.__file__).parent / "configs" / "crowded.yaml"
GRID_SIZE = 448 // STRIDE  # 448 is the recipe's `image_size`


@dataclass(frozen=True)
class CaptionRun:
    """The settings of one run. All others are the recipe's."""

    method: str
    tokens: int | None = 25  # of the soft prompt. None: any number, as the recipe trains, measured at `BUDGETS`
    steps: int = 400
    seed: int = 0
    stamps: bool = False  # of Tux Paint, in place of OpenMoji's drawings

    @property
    def name(self) -> str:
        stamps = ".stamps" if self.stamps else ""
        return f"captions.{self.method}.{self.tokens or 'any'}-tokens.seed{self.seed}.{self.steps}{stamps}"


def train(run: CaptionRun) -> dict[str, Any]:
    """Trains a run as `examples/pretrain.py` does. Returns figures and captions for each number of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        model, processor, train_dataset, test_dataset, data_args, generation_args, args = prepare_training(
            parse(run, folder)
        )
        collator = CaptionCollator(processor, data_args, training=True, seed=run.seed)
        data = {"train_dataset": train_dataset, "data_collator": collator, "processing_class": processor}
        EVLGenTrainer(model=model, args=args, **data).train()
        evaluation = data_args, generation_args, args.per_device_eval_batch_size, args.autocast_dtype
        truths = [row[data_args.caption_column] for row in test_dataset.texts]
        held_out, things = {}, list_things(run.stamps)
        for tokens in BUDGETS if run.tokens is None else (run.tokens,):
            processor.num_image_tokens = tokens
            figures, captions = evaluate_captions(model, processor, test_dataset, *evaluation)
            figures["names"] = name_score(captions, truths, things)
            held_out[tokens] = {name: round(value, 4) for name, value in figures.items()} | {"captions": captions}
    return {"trained_parameters": model.num_parameters(only_trainable=True), "held_out": held_out}


def parse(run: CaptionRun, output_dir: str) -> tuple[Any, ...]:
    """Parses the arguments that `examples/pretrain.py` would need for this run."""
    fields = connector_fields(run.method, GRID_SIZE, run.tokens or max(BUDGETS))
    arguments = {
        "connector": fields.pop("model_type", "evlgen_tomeformer").removeprefix("evlgen_"),
        "connector_config": json.dumps(fields),
        "max_steps": run.steps,
        "seed": run.seed,
        "output_dir": output_dir,
        **({"dataset": "crowded-stamps"} if run.stamps else {}),
    }
    parsed = parse_recipe(arguments, RECIPE)
    if run.tokens is not None:
        parsed[1].image_token_range = parsed[1].num_image_tokens = None
    return parsed


def name_score(captions: Sequence[str], truths: Sequence[str], things: Sequence[str]) -> float:
    """F1 of the things that captions name, over all captions. A thing that is there twice counts twice."""
    longest_first = sorted(map(re.escape, things), key=len, reverse=True)
    name = re.compile(rf"\b(?:{'|'.join(longest_first)})\b")
    named, there = (map(Counter, map(name.findall, texts)) for texts in (captions, truths))
    pairs = list(zip(named, there, strict=True))
    found = sum((mine & true).total() for mine, true in pairs)
    return 2 * found / sum(mine.total() + true.total() for mine, true in pairs)
