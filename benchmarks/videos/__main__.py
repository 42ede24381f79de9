"""Tests what merged videos keep, by SmolLM2's answers to questions about order and single frames.

    python -m benchmarks.videos --methods merge --seeds 0 1 2

trains what `benchmarks/videos/results.jsonl` lacks, appends a line for each run, with its commit, and prints the
tables. A run takes 14 minutes on one core. Before the first one, all videos are merged, which takes 4 minutes.

Videos are composed of the features of animated emoji, at one frame a second, and merged to 196 tokens. A connector
turns them into 36 tokens of the demo's frozen language model. Older lines are of a text decoder of 4 layers, which was
trained together with a connector, also on means of frames; and of a training loop without the Trainer. Their code was
deleted.
"""

import argparse
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, set_seed

from common.arguments import DataArguments, EVLGenTrainingArguments, GenerationArguments
from common.data.collator import CaptionCollator
from common.demo.towers import prepare_language_model, prepare_vision_tower
from common.evaluation.captions import generate_captions
from common.models import connector_fields, load_image_processor
from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.video_merging import VideoTokens, add_frames, place_frames
from processing_evlgen import EVLGenProcessor

from ..connectors.methods import connector_of
from ..connectors.training_run import fit
from ..results import Result, markdown_table, read_results, spread, train_missing
from .clips import BACKGROUND_VIDEOS, MOMENT, MOMENTS_ORDER, SHORT_KINDS, compose, load_frames

RESULTS = Path(__file__).parent / "results.jsonl"
TOKENS = 36  # of the soft prompt
STEPS = 400
RECIPE = {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.05, "bf16": True}
RECIPE |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 50, "dataloader_drop_last": True}
RECIPE |= {"save_strategy": "no"}
WARMUP_STEPS = 50
WHITENING_VIDEOS = 200
VIDEOS_AT_ONCE, FRAMES_AT_ONCE = 32, 8  # while frames are merged

METHODS = MERGE, TIMELESS = ("merge", "merge without times")

# What differs from the connectors of `benchmarks.connectors`, which have 25 tokens.
CONNECTORS = {"qformer-chooses-first": {"num_query_tokens": TOKENS}, "evlgen": {"merge_r": [98, 49, 13]}}


@dataclass(frozen=True)
class Run:
    """The settings of one run."""

    connector: str
    method: str
    seed: int = 0
    steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.connector}, {self.method}, seed {self.seed}"


@cache
@torch.no_grad()
def merge_split(split: str) -> dict[str, torch.Tensor]:
    """Merges the videos of a split as a model with `video_mode="merge"` does, one frame a second.

    Returns `features`, float16, `(videos, tokens, dim)`, and `places`, `(videos, tokens, 3)`.
    """
    frames, (clips, _) = load_frames()[split], compose(split)
    by_length = defaultdict(list)
    for index, clip in enumerate(clips):
        by_length[len(clip)].append(index)
    merged: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for indices in tqdm(by_length.values(), desc=f"Merging {split} videos", unit="length"):
        for part in torch.tensor(indices).split(VIDEOS_AT_ONCE):
            pool = merge_clips(frames, torch.tensor([clips[index] for index in part]))
            merged |= zip(part.tolist(), zip(pool.features.half(), pool.places, strict=True), strict=True)
    features, places = zip(*(merged[index] for index in range(len(clips))), strict=True)
    return {"features": torch.stack(features), "places": torch.stack(places)}


def merge_clips(frames: torch.Tensor, chosen: torch.Tensor) -> VideoTokens:
    """Merges videos of one length, from `frames`, `(frames, tokens, dim)`, chosen by index, `(videos, length)`."""
    pool, videos = None, torch.arange(len(chosen))
    for start in range(0, chosen.shape[1], FRAMES_AT_ONCE):
        part = chosen[:, start : start + FRAMES_AT_ONCE].T  # (frames at once, videos)
        times = torch.arange(start, start + len(part)).float().repeat_interleave(len(videos))
        placed = place_frames(frames[part.flatten()], times, class_token=False)
        pool = add_frames(pool, placed, [videos] * len(part), class_token=False)
    return pool


def train(run: Run) -> Result:
    """Trains a run. Returns its loss and the share of right answers of each kind in the test split."""
    rows = {split: load_rows(split, run.method) for split in ("train", "test")}
    set_seed(run.seed)
    features = merge_split("train")["features"]  # (videos, tokens, dim)
    model, processor = build_captioner(run.connector, num_tokens=features.shape[1])
    model.whiten_vision_projection(features[:: max(1, len(features) // WHITENING_VIDEOS)].float())
    data_args = DataArguments(prompt_column="question", caption_column="answer")
    collators = [CaptionCollator(processor, data_args, training, seed=run.seed) for training in (True, False)]
    steps = {"max_steps": run.steps, "warmup_steps": min(WARMUP_STEPS, run.steps // 2)}
    with tempfile.TemporaryDirectory() as folder:
        # The last logged loss is the mean of the last tenth of the steps.
        args = EVLGenTrainingArguments(
            output_dir=folder, seed=run.seed, logging_steps=max(1, run.steps // 10), **steps, **RECIPE
        )
        _, losses = fit(model.train(), rows["train"], collators[0], args, processing_class=processor)
    answers = generate_captions(model, rows["test"], collators[1], GenerationArguments(), args)
    right = defaultdict(list)
    for row, answer in zip(rows["test"], answers, strict=True):
        right[row["kind"]].append(answer == row["answer"])
    held_out = {kind: round(mean(values), 4) for kind, values in right.items()}
    return {"training_loss": round(losses[-1][1], 4), "held_out": held_out}


def load_rows(split: str, method: str) -> list[dict[str, Any]]:
    """The texts of a split with their merged videos, in the form of cached features."""
    features, places = (tensor.numpy() for tensor in merge_split(split).values())
    if method == TIMELESS:
        places = places * np.float32([0, 1, 1])
    texts = compose(split)[1]
    return [{**t, "vision_features": [features[t["clip"]]], "token_places": [places[t["clip"]]]} for t in texts]


def build_captioner(connector: str, num_tokens: int) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor]:
    """The demo's towers with a fresh connector for merged videos."""
    vision, text = str(prepare_vision_tower()), str(prepare_language_model())
    kind, fields = connector_of(connector, round(num_tokens**0.5))
    fields |= {**CONNECTORS[connector], "max_position_embeddings": 256}
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        vision,
        text,
        connector_config=connector_fields(kind, {**fields, "class_token": False}),
        num_vision_tokens=num_tokens,
        video_mode="merge",
    )
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.chat_template = None  # a question follows the video, and its answer the question
    processor = EVLGenProcessor(load_image_processor(vision), tokenizer, num_image_tokens=TOKENS)
    model.generation_config.update(eos_token_id=processor.end_of_text_id, pad_token_id=tokenizer.pad_token_id)
    return model, processor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connector", choices=CONNECTORS, default=next(iter(CONNECTORS)))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="Default: all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Default: 0.")
    arguments = parser.parse_args(argv)
    runs = [Run(arguments.connector, method, seed) for seed in arguments.seeds for method in arguments.methods]
    train_missing(runs, RESULTS, train)
    results = defaultdict(list)
    for result in read_results(RESULTS).values():
        if "connector" in result["run"]:
            results[result["run"]["connector"], result["run"]["method"]].append(result["held_out"])
    print(f"\nShort videos\n\n{accuracy_table(results, dict(zip(SHORT_KINDS, SHORT_KINDS, strict=True)))}")
    for kind in (MOMENT, MOMENTS_ORDER):
        columns = {f"{length} frames": f"{kind}, {length}" for length in BACKGROUND_VIDEOS["test"]}
        print(f"\nOn a background: {kind}\n\n{accuracy_table(results, columns)}")


def accuracy_table(results: dict[tuple[str, str], list[dict[str, float]]], columns: dict[str, str]) -> str:
    """Shares of right answers in %, over seeds: a row for each method. `columns` has the kind for each header."""
    rows = [
        [*names, len(seeds), *(spread([seed[kind] for seed in seeds]) for kind in columns.values())]
        for names, seeds in results.items()
    ]
    return markdown_table(["connector", "method", "seeds", *columns], rows)


if __name__ == "__main__":
    main()
