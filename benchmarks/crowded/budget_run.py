"""Trains a connector on crowded scenes with several numbers of tokens, and measures what it keeps at each of them."""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import mean
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict
from tqdm import tqdm
from transformers import AutoModel, LlamaConfig, get_cosine_with_min_lr_schedule_with_warmup

from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.feature_cache import cache_split
from common.demo.crowded_scenes import list_things, load_crowded_scenes
from common.demo.towers import prepare_vision_tower
from common.models import load_image_processor
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration, tomeformer
from modeling_evlgen.token_merging import TokenMerging, keep_distinctive

from ..timing import count_flops
from .connector_settings import ALL_TOKENS, BUDGETS, RANDOM, TILES, VIEW, connector_fields
from .scene_questions import KINDS, Answers, QuestionReader, list_questions, read_answers

BATCH = 16  # scenes
READER_DIM = 256
VISION_DIM = 112  # of EfficientNet-Lite0's feature map
REFERENCE_BUDGET = 16  # tokens
WHITENING_IMAGES = 200
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
    learning_rate: float = 1e-3  # the demo's
    stamps: bool = False  # of Tux Paint, in place of OpenMoji's drawings

    @property
    def name(self) -> str:
        scenes = ("textured" if self.textured else "plain") + (".stamps" if self.stamps else "")
        rate = "" if self.learning_rate == 1e-3 else f".lr{self.learning_rate:g}"
        return f"{self.method}.{self.size}.{scenes}.budget-{self.budget or 'any'}.seed{self.seed}.{self.steps}{rate}"

    @property
    def setting(self) -> str:
        """The scenes and the training, which runs share if their figures are compared."""
        drawings = "stamps" if self.stamps else "OpenMoji"
        background = "textured" if self.textured else "plain"
        training = f"{self.steps} steps, learning rate {self.learning_rate:g}"
        return f"{self.size} x {self.size} pixels, {drawings}, {background}, {training}"

    @property
    def view_size(self) -> int:
        """Height and width of the images or tiles that the tower gets, in pixels."""
        return VIEW_SIZE if self.method in (VIEW, TILES) else self.size

    @property
    def tiles(self) -> int:
        """The number of tiles that an image is cut into."""
        return (self.size // VIEW_SIZE) ** 2 if self.method == TILES else 1

    @property
    def budgets(self) -> tuple[int, ...]:
        """The numbers of tokens that the run is trained for."""
        if self.method == ALL_TOKENS:
            return ((self.size // STRIDE) ** 2,)
        return BUDGETS if self.budget is None else (self.budget,)

    @property
    def reference_budget(self) -> int:
        """The number of tokens of the step whose operations are counted."""
        return REFERENCE_BUDGET if REFERENCE_BUDGET in self.budgets else self.budgets[0]


def keep_random(x: torch.Tensor, num_output_tokens: int, class_token: bool = False) -> TokenMerging:
    """Keeps random tokens, and the mean of all others."""
    return keep_distinctive(torch.randn_like(x), num_output_tokens, class_token)


def train(run: BudgetRun) -> dict[str, Any]:
    """Trains a run. Returns its cost and the held-out figures at each budget."""
    set_seed(run.seed)
    scenes = load_crowded_scenes(run.size, run.textured, run.stamps)
    things = list_things(run.stamps)
    model, reader = build(run)
    features = load_features(run, model, scenes)
    sample = features["train"][:: max(1, len(features["train"]) // WHITENING_IMAGES)]
    model.whiten_vision_projection(torch.from_numpy(np.array(sample)).float().flatten(0, 1))
    choice = patch.object(tomeformer, "keep_distinctive", keep_random) if run.method == RANDOM else nullcontext()
    with choice:
        loss = fit(run, model, reader, features["train"], read_answers(scenes["train"]["caption"][:], things))
        test = features["test"], scenes["test"], things
        held_out = {budget: measure(model, reader, *test, budget) for budget in run.budgets}
    return {
        "connector_parameters": model.connector.num_parameters(),
        "flops_per_step": count_flops(partial(training_step(run), run.reference_budget)),
        "training_loss": loss,
        "held_out": held_out,
    }


def build(run: BudgetRun) -> tuple[EVLGenForConditionalGeneration, QuestionReader]:
    """A fresh model with the demo's tower, and a reader of its soft prompts. The language model is only a width."""
    tower = AutoModel.from_pretrained(prepare_vision_tower())
    grid = run.view_size // STRIDE
    text = LlamaConfig(hidden_size=READER_DIM, intermediate_size=8, num_hidden_layers=1, vocab_size=8)
    low, high = min(run.budgets), max(run.budgets)
    config = EVLGenConfig(
        vision_config=tower.config,
        connector_config=connector_fields(run.method, grid, high),
        text_config=text,
        num_vision_tokens=grid**2,
        vision_hidden_size=VISION_DIM,
        image_token_range=None if run.method == ALL_TOKENS else [low, high],
    )
    return EVLGenForConditionalGeneration(config, vision_tower=tower), QuestionReader(READER_DIM)


def load_features(run: BudgetRun, model: EVLGenForConditionalGeneration, scenes: DatasetDict) -> dict[str, np.ndarray]:
    """Features of all scenes of each split, `(scenes, tiles, tokens, dim)`. They lie on disk, or the tower runs."""
    image_processor = load_image_processor(prepare_vision_tower())
    image_processor.size = {"height": run.view_size, "width": run.view_size}
    # The cache uses a processor's images alone.
    processor = SimpleNamespace(image_processor=image_processor, max_tiles=run.tiles)
    views = CaptionCollator(processor, DataArguments(), False)
    features = {name: cache_split(model, rows, views).features for name, rows in scenes.items()}
    return {name: tiles.reshape(len(scenes[name]), run.tiles, *tiles.shape[-2:]) for name, tiles in features.items()}


def fit(
    run: BudgetRun,
    model: EVLGenForConditionalGeneration,
    reader: QuestionReader,
    features: np.ndarray,
    answers: Answers,
) -> float:
    """Trains the connector and the reader with the demo's recipe. Returns the loss of the last 50 steps."""
    trained = [weight for module in (model, reader) for weight in module.parameters() if weight.requires_grad]
    matrices = {"params": [weight for weight in trained if weight.ndim > 1], "weight_decay": 0.05}
    vectors = {"params": [weight for weight in trained if weight.ndim < 2], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, vectors], lr=run.learning_rate)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 50, run.steps, min_lr_rate=0.03)
    draw, order, losses = random.Random(run.seed), [], []
    progress = tqdm(range(run.steps), run.name, unit="step")
    for _ in progress:
        if len(order) < BATCH:
            order = draw.sample(range(len(features)), len(features))
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        losses.append(backward(model, reader, features, answers, rows, draw.choice(run.budgets)))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    return round(float(np.mean(losses[-50:])), 4)


def backward(
    model: EVLGenForConditionalGeneration,
    reader: QuestionReader,
    features: np.ndarray,
    answers: Answers,
    rows: list[int],
    budget: int,
) -> float:
    """Computes the gradient of the loss of some scenes. Returns the loss."""
    prompts = read_prompts(model, features[rows], budget)
    loss = reader.loss(prompts, answers.of(torch.tensor(rows)))
    loss.backward()
    return loss.item()


def training_step(run: BudgetRun) -> Callable[[int], float]:
    """Forward and backward pass of a fresh model on random features of a batch, for a number of tokens."""
    model, reader = build(run)
    features = np.random.default_rng(0).standard_normal(
        (BATCH, run.tiles, (run.view_size // STRIDE) ** 2, VISION_DIM), np.float32
    )
    answers = read_answers(["an owl and a bus"] * BATCH)
    return partial(backward, model.train(), reader, features, answers, list(range(BATCH)))


def read_prompts(model: EVLGenForConditionalGeneration, features: np.ndarray, budget: int) -> torch.Tensor:
    """The soft prompts of scenes with features `(scenes, tiles, tokens, dim)`, as `(scenes, budget, dim)`."""
    scenes, tiles = features.shape[:2]
    grids = torch.tensor([(1, math.isqrt(tiles), math.isqrt(tiles))] * scenes)
    features = torch.from_numpy(np.array(features)).float().flatten(0, 1)  # from disk
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.project_vision_features(features, grids, [budget] * scenes).pooler_output.float()


@torch.no_grad()
def measure(
    model: EVLGenForConditionalGeneration,
    reader: QuestionReader,
    features: np.ndarray,
    scenes: Dataset,
    things: Sequence[str],
    budget: int,
) -> dict[str, Any]:
    """Held-out figures at a budget, and for each scene and question whether it is right, as a string of 0 and 1."""
    answers, asked = read_answers(scenes["caption"][:], things), list_questions(scenes, things)
    parts = np.array_split(np.arange(len(scenes)), -(-len(scenes) // 50))
    logits = [reader(read_prompts(model, features[part], budget)) for part in parts]
    given = Answers(*(torch.cat(parts).argmax(dim=-1) for parts in zip(*logits, strict=True)))
    found = torch.minimum(given.how_many, answers.how_many).sum()
    named = 2 * found / (given.how_many.sum() + answers.how_many.sum())
    exact = (given.how_many == answers.how_many).all(dim=1)
    right = {kind: [] for kind in KINDS}
    for kind, scene, place in zip(*asked, strict=True):
        table = KINDS.index(kind)
        right[kind].append(bool(given[table][scene, place] == answers[table][scene, place]))
    bits = [int(is_right) for values in (exact.tolist(), *right.values()) for is_right in values]
    return {
        "names": round(named.item(), 4),
        "exact": round(exact.float().mean().item(), 4),
        **{kind: round(mean(values), 4) for kind, values in right.items()},
        "right": "".join(map(str, bits)),
    }
