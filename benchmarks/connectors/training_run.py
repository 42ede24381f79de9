"""Trains one connector with the steps of `examples/pretrain.py`, and measures a curve of held-out figures."""

import json
import re
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from statistics import mean
from typing import Any

import pretrain
import torch
from transformers import TrainerCallback, set_seed

from common.arguments import EVLGenTrainingArguments, parse_arguments
from common.data.collator import CaptionCollator
from common.data.feature_cache import FeatureDataset, cache_features
from common.data.loading import load_datasets
from common.data.rows import true_captions
from common.demo.crowded_scenes import CONCEPTS
from common.evaluation.captions import WrongImages, caption_loss, generate_captions
from common.models import build_model
from common.training.trainer import EVLGenTrainer
from modeling_evlgen import EVLGenForConditionalGeneration, limit_logits

from ..timing import count_flops
from .methods import (
    DATASETS,
    LEARNING_RATE,
    STAGE_ONE_BATCH,
    STAGE_ONE_RATE,
    STAGE_ONE_STEPS,
    STAGE_ONE_WARMUP,
    connector_of,
)
from .two_stage import CaptionVocabulary, StageOne, StageOneCollator


@dataclass(frozen=True)
class Run:
    """A method that is trained on a data set."""

    method: str
    dataset: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.dataset}.{self.method}.seed{self.seed}"


def train(run: Run) -> dict[str, Any]:
    """Trains a run as `examples/pretrain.py` does. Returns its settings, number of parameters, cost and curves."""
    started = time.time()
    connector, fields = connector_of(run.method, DATASETS[run.dataset].grid)
    result: dict[str, Any] = {"connector": connector, "fields": fields}
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"connector": connector, "connector_config": json.dumps(fields), "output_dir": folder}
        model_args, processor_args, data_args, generation_args, args = parse(run, arguments)
        set_seed(args.seed)
        splits = load_datasets(data_args, args.seed)
        model, processor = build_model(model_args, processor_args)
        train_dataset, test_dataset = cache_features(model, processor, *splits, data_args, args.seed)
        pretrain.whiten_vision_projection(model, processor, train_dataset, data_args, model_args.whitening_images)
        result["trained_parameters"] = model.num_parameters(only_trainable=True)
        collators = [CaptionCollator(processor, data_args, training, seed=run.seed) for training in (True, False)]
        if run.method == "qformer-two-stage":
            result |= train_stage_one(model, train_dataset, collators[0], args)
        # The caption loss trains EVLGen's only stage, and BLIP-2's second.
        curve = HeldOutCurve(run, test_dataset, collators[1], generation_args)
        others = {"processing_class": processor, "callbacks": [curve]}
        flops, losses = fit(model.train(), train_dataset, collators[0], args, **others)
    result |= {"flops_per_step": flops, "curve": curve.points, "training_loss": losses}
    return {**result, "minutes": round((time.time() - started) / 60, 1)}


def parse(run: Run, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Parses the arguments that `examples/pretrain.py` would need for a run."""
    data = DATASETS[run.dataset]
    arguments |= {
        "dataset": run.dataset,
        "learning_rate": LEARNING_RATE,
        "max_steps": data.eval_steps[-1],
        "max_new_tokens": data.max_new_tokens,
        "seed": run.seed,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": "false",  # else the log would hold the mean of earlier losses in place of NaN
    }
    if data.test_images is not None:
        arguments["max_test_samples"] = data.test_images
    argv = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    parsed = parse_arguments(*pretrain.ARGUMENTS, argv=argv, recipe=data.recipe)
    parsed[1].image_token_range = parsed[1].num_image_tokens = None  # the connector makes one number of tokens
    return parsed


def fit(
    model: torch.nn.Module,
    dataset: FeatureDataset,
    collator: CaptionCollator,
    args: EVLGenTrainingArguments,
    **others: Any,
) -> tuple[int, list[list[float]]]:
    """Trains a model. Returns the floating-point operations of a step, and the logged losses with their steps."""
    batch = collator(list(islice(dataset, args.per_device_train_batch_size)))
    with torch.random.fork_rng():  # the training draws the same numbers as without this step
        flops = count_flops(lambda: model(**limit_logits(batch))["loss"].backward())
    model.zero_grad()
    trainer = EVLGenTrainer(model=model, args=args, train_dataset=dataset, data_collator=collator, **others)
    trainer.train()
    losses = [[entry["step"], round(entry["loss"], 5)] for entry in trainer.state.log_history if "loss" in entry]
    return flops, losses


def train_stage_one(
    model: EVLGenForConditionalGeneration,
    dataset: FeatureDataset,
    collator: CaptionCollator,
    args: EVLGenTrainingArguments,
) -> dict[str, Any]:
    """Trains the Q-Former of the model by BLIP-2's first stage. Returns the cost of a step and the losses."""
    captions = [true_captions(row, collator.data_args)[0] for row in dataset.texts]
    pairs = StageOneCollator(collator.processor, collator.data_args, training=True)
    pairs.vocabulary = CaptionVocabulary(collator.processor.tokenizer, captions)
    args = replace(
        args,
        max_steps=STAGE_ONE_STEPS,
        learning_rate=STAGE_ONE_RATE,
        warmup_steps=STAGE_ONE_WARMUP,
        per_device_train_batch_size=STAGE_ONE_BATCH,
    )
    flops, losses = fit(StageOne(model, len(pairs.vocabulary)).train(), dataset, pairs, args)
    settings = {"stage_one_steps": STAGE_ONE_STEPS, "stage_one_batch_size": STAGE_ONE_BATCH}
    return {**settings, "stage_one_flops_per_step": flops, "stage_one_training_loss": losses}


class HeldOutCurve(TrainerCallback):
    """Measures held-out loss with right and wrong images, and captions, after some of the steps."""

    def __init__(self, run: Run, dataset: FeatureDataset, collator: CaptionCollator, generation_args: Any):
        self.run, self.dataset, self.collator = run, dataset, collator
        self.generation_args = generation_args
        self.wrong_images = WrongImages(dataset, collator.data_args)
        self.references = [true_captions(row, collator.data_args) for row in dataset]
        self.points: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        data, step = DATASETS[self.run.dataset], state.global_step
        if step not in data.eval_steps:
            return
        loss = caption_loss(model, self.dataset, self.collator, args)
        figures = {"loss": loss, "gap": caption_loss(model, self.wrong_images, self.collator, args) - loss}
        if step in data.caption_steps:  # generation takes as long as many steps
            captions = generate_captions(model, self.dataset, self.collator, self.generation_args, args)
            figures["exact"] = mean(map(list.__contains__, self.references, captions))
            if self.run.dataset == "crowded-scenes":
                figures["named"] = name_score(captions, [references[0] for references in self.references])
        self.points.append({"step": step, **{name: round(float(value), 5) for name, value in figures.items()}})
        print(self.run.name, self.points[-1], flush=True)


def name_score(captions: list[str], truths: list[str]) -> float:
    """F1 of the drawings that captions name, over all captions. A drawing that is there twice counts twice."""
    longest_first = sorted(map(re.escape, CONCEPTS), key=len, reverse=True)
    name = re.compile(rf"\b(?:{'|'.join(longest_first)})\b")
    named, there = (map(Counter, map(name.findall, texts)) for texts in (captions, truths))
    pairs = list(zip(named, there, strict=True))
    found = sum((mine & true).total() for mine, true in pairs)
    return 2 * found / sum(mine.total() + true.total() for mine, true in pairs)
