"""Trains a captioner on ordered videos whose frames were pooled by one method, and measures it."""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, get_scheduler, set_seed

from configuration_evlgen import EVLGenConfig
from modeling_evlgen import EVLGenForConditionalGeneration, limit_logits
from modeling_evlgen.labels import shift_labels
from processing_evlgen import EVLGenProcessor

from ..models import DEMO_VISION, encoder_fields
from .clip_pooling import pool_clips
from .emoji_frames import load_frames
from .frame_blocks import CONTEXTUALIZERS, POSITIONS, FrameBlocks, mean_and_frames
from .ordered_clips import Text, compose
from .small_decoder import prepare_small_decoder, train_from_scratch

TOKENS = 36  # of the soft prompt
TRAINING_BATCH, TEST_BATCH = 16, 50
WHITENING_VIDEOS = 200
CONNECTOR = {
    **encoder_fields(hidden_size=384, layers=2),
    "class_token": False,
    "max_position_embeddings": 256,
    "position_initializer_range": 0.1,  # about the size of the tokens
    "output_position_initializer_range": 1.0,
    "pre_norm": True,
    "branch_initializer_range": 0.0,
    "merge_metric": "hidden_states",
    "num_merged_tokens": TOKENS,
}
RECIPE = {"lr": 5e-4, "weight_decay": 0.05}
WARMUP_STEPS = 50


@dataclass(frozen=True)
class OrderRun:
    """The settings of one run."""

    method: str
    seed: int = 0
    steps: int = 1000

    @property
    def name(self) -> str:
        return f"{self.method.replace(' ', '-')}.seed{self.seed}.{self.steps}"


class ClipTexts(Dataset):
    """Texts with the pooled features of their videos."""

    def __init__(self, texts: list[Text], pooled: dict[str, torch.Tensor]):
        self.texts, self.pooled = texts, pooled

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = self.texts[index]
        return {**text, **{name: values[text["clip"]] for name, values in self.pooled.items()}}


class ClipCollator:
    """Turns texts into inputs of the model. Videos take the placeholders of images, as their features are cached."""

    def __init__(self, processor: EVLGenProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = {"text": [row["question"] for row in rows], "suffix": [row["answer"] for row in rows]}
        features = torch.stack([row["features"] for row in rows]).float()  # (batch, tokens, dim)
        batch = dict(self.processor(vision_features=features, **texts))
        if "places" in rows[0]:
            batch["token_places"] = torch.stack([row["places"] for row in rows])  # (batch, tokens, 3)
        if "frames" in rows[0]:
            batch["frames"] = [row["frames"] for row in rows]  # each (its length, tokens, dim)
        return batch


def train(run: OrderRun) -> dict[str, Any]:
    """Trains a run. Returns its loss and the share of right answers of each kind in the test split."""
    clips, texts = zip(*(compose(split) for split in ("train", "test")), strict=True)
    frames = load_frames()
    pool = mean_and_frames if run.method in CONTEXTUALIZERS else partial(pool_clips, run.method)
    splits = {
        split: ClipTexts(texts[i], pool(split, clips[i], frames[split])) for i, split in enumerate(("train", "test"))
    }
    set_seed(run.seed)
    model, processor = build_captioner(splits)
    if run.method in CONTEXTUALIZERS:
        model.frame_blocks = FrameBlocks(splits["train"].pooled["frames"].frames, run.method == POSITIONS)
    collator = ClipCollator(processor)
    features = splits["train"].pooled["features"]
    sample = features[:: max(1, len(features) // WHITENING_VIDEOS)].float()
    model.whiten_vision_projection(sample)
    loss = optimize(model.train(), _endless(splits["train"], collator), run.steps)
    right = find_right_answers(model.eval(), DataLoader(splits["test"], TEST_BATCH, collate_fn=collator))
    by_kind = defaultdict(list)
    for text, is_right in zip(texts[1], right, strict=True):
        by_kind[text["kind"]].append(is_right)
    return {
        "training_loss": round(loss, 4),
        "held_out": {kind: round(mean(values), 4) for kind, values in by_kind.items()},
    }


def build_captioner(splits: dict[str, ClipTexts]) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor]:
    """A fresh captioner for pooled features. Its vision tower and image processor are never used."""
    all_texts = [text[name] for split in splits.values() for text in split.texts for name in ("question", "answer")]
    decoder = prepare_small_decoder(all_texts)
    processor = EVLGenProcessor(CLIPImageProcessor(), AutoTokenizer.from_pretrained(decoder), num_image_tokens=TOKENS)
    pooled = splits["train"].pooled
    num_tokens = pooled["features"].shape[1]
    connector = dict(CONNECTOR)
    if num_tokens > TOKENS:  # otherwise no token is left out, and tokens are no grid
        connector |= {"distinctive_factor": 2, "position_grid_size": round(num_tokens**0.5)}
    config = EVLGenConfig(
        **{**DEMO_VISION, "num_vision_tokens": num_tokens},
        connector_config=connector,
        text_config=AutoConfig.from_pretrained(decoder),
        image_token_id=processor.image_token_id,
        video_mode="merge" if "places" in pooled else "mean",
    )
    model = EVLGenForConditionalGeneration(config)
    train_from_scratch(model.language_model)
    return model, processor


def _endless(texts: ClipTexts, collator: ClipCollator) -> Iterator[dict[str, torch.Tensor]]:
    loader = DataLoader(texts, TRAINING_BATCH, shuffle=True, drop_last=True, collate_fn=collator)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def optimize(model: EVLGenForConditionalGeneration, batches: Iterator[dict[str, torch.Tensor]], steps: int) -> float:
    """Trains with AdamW and a cosine schedule. Returns the mean loss of the last tenth of the steps."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, **RECIPE, fused=True)
    scheduler = get_scheduler("cosine", optimizer, min(WARMUP_STEPS, steps // 2), steps)
    losses = []
    for batch in tqdm(itertools.islice(batches, steps), total=steps, unit="step", mininterval=10):
        loss = run_model(model, batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            tqdm.write(f"step {len(losses)}: loss {mean(losses[-50:]):.3f}")
    return mean(losses[-max(1, steps // 10) :])


def run_model(model: EVLGenForConditionalGeneration, batch: dict[str, torch.Tensor]) -> Any:
    """The model's output for a batch of [`ClipCollator`], in bfloat16. Logits are those of the answers' positions."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if "frames" in batch:
            batch = dict(batch)
            batch["vision_features"] = model.frame_blocks(batch.pop("frames"))
        return model(**limit_logits(batch))


@torch.no_grad()
def find_right_answers(model: EVLGenForConditionalGeneration, loader: DataLoader) -> list[bool]:
    """Whether greedy generation gives exactly the true answer to each text.

    It does if each token of the answer, and its end, has the highest score after those before it. So one pass is
    enough.
    """
    right: list[bool] = []
    for batch in tqdm(loader, desc="Test", leave=False):
        targets = shift_labels(batch["labels"])  # (batch, sequence)
        is_target = targets != -100
        is_best = run_model(model, batch)["logits"].argmax(dim=-1) == targets[is_target]  # (kept,)
        right += [bool(row.all()) for row in is_best.split(is_target.sum(dim=1).tolist())]
    return right
