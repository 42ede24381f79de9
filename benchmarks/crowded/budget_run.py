"""Trains a connector on crowded scenes with several numbers of tokens, and measures what it keeps at each of them."""

import random
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
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
from common.data.feature_cache import FeatureDataset, cache_split
from common.demo.crowded_scenes import load_crowded_scenes
from common.demo.towers import prepare_vision_tower
from common.models import load_image_processor
from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration, tomeformer
from modeling_evlgen.token_merging import TokenMerging, keep_distinctive

from ..timing import count_flops
from .connector_settings import ALL_TOKENS, BUDGETS, RANDOM, VIEW, connector_fields
from .scene_questions import KINDS, Answers, QuestionReader, list_questions, read_answers

BATCH = 16  # scenes
READER_DIM = 256
VISION_DIM = 112  # of EfficientNet-Lite0's feature map
REFERENCE_BUDGET = 16  # tokens of the step whose operations are counted
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

    @property
    def name(self) -> str:
        background = "textured" if self.textured else "plain"
        return f"{self.method}.{self.size}.{background}.budget-{self.budget or 'any'}.seed{self.seed}.{self.steps}"

    @property
    def view_size(self) -> int:
        """Height and width of the images that the tower gets, in pixels."""
        return VIEW_SIZE if self.method == VIEW else self.size

    @property
    def budgets(self) -> tuple[int, ...]:
        """The numbers of tokens that the run is trained for."""
        if self.method == ALL_TOKENS:
            return ((self.size // STRIDE) ** 2,)
        return BUDGETS if self.budget is None else (self.budget,)


def keep_random(x: torch.Tensor, num_output_tokens: int, class_token: bool = False) -> TokenMerging:
    """Keeps random tokens, and the mean of all others."""
    return keep_distinctive(torch.randn_like(x), num_output_tokens, class_token)


def train(run: BudgetRun) -> dict[str, Any]:
    """Trains a run. Returns its cost and the held-out figures at each budget."""
    set_seed(run.seed)
    scenes = load_crowded_scenes(run.size, run.textured)
    model, reader = build(run)
    features = load_features(run, model, scenes)
    model.whiten_vision_projection(
        features["train"].take(range(0, len(scenes["train"]), max(1, len(scenes["train"]) // WHITENING_IMAGES)))
    )
    choice = patch.object(tomeformer, "keep_distinctive", keep_random) if run.method == RANDOM else nullcontext()
    with choice:
        cost = fit(run, model, reader, features["train"], scenes["train"])
        held_out = {budget: measure(model, reader, features["test"], scenes["test"], budget) for budget in run.budgets}
    parameters = sum(weight.numel() for weight in model.connector.parameters())
    return {"connector_parameters": parameters, **cost, "held_out": held_out}


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


class SceneFeatures:
    """The cached features of all scenes of a split, read from disk."""

    def __init__(self, dataset: FeatureDataset):
        self.dataset = dataset

    def take(self, scenes: Iterable[int]) -> torch.Tensor:
        """Features of some scenes, `(scenes, tokens, dim)`."""
        rows = [self.dataset.features[scene, 0] for scene in scenes]
        return torch.from_numpy(np.stack(rows)).float()


def load_features(
    run: BudgetRun, model: EVLGenForConditionalGeneration, scenes: DatasetDict
) -> dict[str, SceneFeatures]:
    """Runs the tower over all scenes, or finds their features on disk."""
    image_processor = load_image_processor(prepare_vision_tower())
    image_processor.size = {"height": run.view_size, "width": run.view_size}
    # The cache uses a processor's images alone.
    views = CaptionCollator(SimpleNamespace(image_processor=image_processor, max_tiles=1), DataArguments(), False)
    return {name: SceneFeatures(cache_split(model, rows, views)) for name, rows in scenes.items()}


def fit(
    run: BudgetRun,
    model: EVLGenForConditionalGeneration,
    reader: QuestionReader,
    features: SceneFeatures,
    scenes: Dataset,
) -> dict[str, float]:
    """Trains the connector and the reader with the demo's recipe. Returns what a step costs."""
    answers = read_answers(scenes["caption"][:])
    trained = [weight for module in (model, reader) for weight in module.parameters() if weight.requires_grad]
    decayed = [{"params": [w for w in trained if w.ndim > 1], "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(
        [*decayed, {"params": [w for w in trained if w.ndim < 2], "weight_decay": 0}], lr=1e-3
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 50, run.steps, min_lr_rate=0.03)
    draw = random.Random(run.seed)

    def step(rows: list[int], budget: int) -> torch.Tensor:
        loss = reader.loss(read_prompts(model, features.take(rows), budget), answers.of(torch.tensor(rows)))
        loss.backward()
        return loss

    budget = REFERENCE_BUDGET if REFERENCE_BUDGET in run.budgets else run.budgets[0]
    flops = count_flops(lambda: step(list(range(min(BATCH, len(scenes)))), budget))
    start, order, losses = time.process_time(), [], []
    progress = tqdm(range(run.steps), run.name, unit="step")
    for _ in progress:
        if len(order) < BATCH:
            order = draw.sample(range(len(scenes)), len(scenes))
        rows, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        losses.append(step(rows, draw.choice(run.budgets)).item())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}", refresh=False)
    seconds = (time.process_time() - start) / run.steps
    return {
        "flops_per_step": flops,
        "cpu_seconds_per_step": round(seconds, 3),
        "training_loss": round(float(np.mean(losses[-50:])), 4),
    }


def read_prompts(model: EVLGenForConditionalGeneration, features: torch.Tensor, budget: int) -> torch.Tensor:
    """The soft prompts of scenes, `(scenes, budget, dim)`."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model.project_vision_features(features, image_budgets=[budget] * len(features)).pooler_output.float()


@torch.no_grad()
def measure(
    model: EVLGenForConditionalGeneration,
    reader: QuestionReader,
    features: SceneFeatures,
    scenes: Dataset,
    budget: int,
) -> dict[str, Any]:
    """Held-out figures at a budget, and for each scene and question whether it is right, as a string of 0 and 1."""
    answers, asked = read_answers(scenes["caption"][:]), list_questions(scenes)
    logits = [reader(read_prompts(model, features.take(rows), budget)) for rows in torch.arange(len(scenes)).split(50)]
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
