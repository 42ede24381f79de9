"""Compares ways to pool the frames of a video, by SmolLM2's answers to questions about order and single frames.

    python -m benchmarks.videos --methods merge --seeds 0 1 2

trains what `benchmarks/videos/results.jsonl` lacks, appends a line for each run, with its commit, and prints the
tables. A run takes 14 minutes on one core. The first run of a method also pools all videos, which takes 4 minutes.

Videos are composed of the features of animated emoji, at one frame a second, and pooled to at most 196 tokens. A
connector turns them into 36 tokens of the demo's frozen language model. Older lines are of a text decoder of 4 layers,
which was trained together with a connector whose code was deleted.
"""

import argparse
import hashlib
import inspect
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, get_scheduler, set_seed

from common.demo.cache import prepare_once
from common.demo.towers import prepare_language_model, prepare_vision_tower
from common.models import connector_fields, load_image_processor
from modeling_evlgen import EVLGenForConditionalGeneration, limit_logits, video_merging
from modeling_evlgen.texts import shift_labels
from modeling_evlgen.video_merging import add_frames, place_frames
from processing_evlgen import EVLGenProcessor

from ..connectors.methods import connector_of
from ..results import Result, markdown_table, read_results, spread, train_missing
from . import clips as clips_module
from .clips import BACKGROUND_VIDEOS, MOMENT, MOMENTS_ORDER, SHORT_KINDS, Clip, compose, load_frames

RESULTS = Path(__file__).parent / "results.jsonl"
TOKENS = 36  # of the soft prompt
STEPS, TRAINING_BATCH, TEST_BATCH = 400, 16, 50
RECIPE = {"lr": 1e-3, "weight_decay": 0.05}
WARMUP_STEPS = 50
WHITENING_VIDEOS = 200
PARTS = (9, 2, 2)  # in time, rows and columns: 36 means
VIDEOS_AT_ONCE, FRAMES_AT_ONCE = 32, 8  # while frames are pooled

MEAN, PARTS_MEANS, MERGE, TIMELESS = "mean of frames", "means in 9 parts", "merge", "merge without times"
METHODS = (MERGE, TIMELESS, PARTS_MEANS, MEAN)

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


def pool_clips(method: str, split: str, clips: list[Clip], frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pools the videos of a split by one of [`METHODS`], or reads the result of an earlier call.

    `frames` are the features of the split's frames, `(frames, tokens, dim)`. Returns `features`, float16, `(videos,
    tokens, dim)`, and for merged videos `places`, `(videos, tokens, 3)`.
    """
    pooling = MERGE if method == TIMELESS else method
    # Other videos, or another way to merge, have other code.
    code = "".join(map(inspect.getsource, (clips_module, video_merging, POOLINGS[pooling])))
    digest = hashlib.sha256(f"{code}{frames.shape}".encode()).hexdigest()[:8]
    name = f"data/video-order-{pooling.replace(' ', '-')}-{split}-{digest}"
    folder = prepare_once(name, partial(_write_pooled, POOLINGS[pooling], clips, frames))
    pooled = load_file(folder / "videos.safetensors")
    if method == TIMELESS:
        pooled["places"][..., 0] = 0
    return pooled


@torch.no_grad()
def _write_pooled(pool: Callable, clips: list[Clip], frames: torch.Tensor, folder: Path) -> None:
    by_length = defaultdict(list)
    for index, clip in enumerate(clips):
        by_length[len(clip)].append(index)
    batches = [
        indices[start : start + VIDEOS_AT_ONCE]
        for indices in by_length.values()
        for start in range(0, len(indices), VIDEOS_AT_ONCE)
    ]
    pooled: dict[str, torch.Tensor] = {}
    for indices in tqdm(batches, desc="Pooling", unit="batch"):
        chosen = torch.tensor([clips[index] for index in indices])  # (videos, length)
        for name, values in pool(frames, chosen).items():
            empty = torch.empty(len(clips), *values.shape[1:], dtype=values.dtype)
            pooled.setdefault(name, empty)[indices] = values
    folder.mkdir()
    save_file(pooled, folder / "videos.safetensors")


def pool_mean(frames: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """The mean of all frames, `(videos, tokens, dim)`.

    Args:
        frames (`torch.Tensor` of shape `(frames, tokens, dim)`): Features of all frames.
        chosen (`torch.Tensor` of shape `(videos, length)`): The indices of each video's frames.
    """
    return {"features": torch.stack([frames[video].float().mean(dim=0) for video in chosen]).half()}


def pool_parts(frames: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """Means of parts of a video in time and space, `(videos, parts, dim)`. Arguments as in [`pool_mean`]."""
    side = round(frames.shape[1] ** 0.5)
    videos = []
    for video in chosen:
        grid = frames[video].float().unflatten(1, (side, side))  # (length, rows, columns, dim)
        videos.append(F.adaptive_avg_pool3d(grid.movedim(-1, 0), PARTS).flatten(1).T)  # (parts, dim)
    return {"features": torch.stack(videos).half()}


def pool_merge(frames: torch.Tensor, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    """Merges frames as a model with `video_mode="merge"` does, one a second. Arguments as in [`pool_mean`]."""
    pool, videos = None, torch.arange(len(chosen))
    for start in range(0, chosen.shape[1], FRAMES_AT_ONCE):
        part = chosen[:, start : start + FRAMES_AT_ONCE].T  # (frames at once, videos)
        times = torch.arange(start, start + len(part)).float().repeat_interleave(len(videos))
        placed = place_frames(frames[part.flatten()], times, class_token=False)
        pool = add_frames(pool, placed, [videos] * len(part), class_token=False)
    return {"features": pool.features.half(), "places": pool.places}


POOLINGS = {MEAN: pool_mean, PARTS_MEANS: pool_parts, MERGE: pool_merge}


def collate(processor: EVLGenProcessor, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Turns texts into inputs of the model. Videos take the placeholders of images, as their features are cached."""
    texts = {"text": [row["question"] for row in rows], "suffix": [row["answer"] for row in rows]}
    features = torch.stack([row["features"] for row in rows]).float()  # (batch, tokens, dim)
    batch = dict(processor(vision_features=features, **texts))
    if "places" in rows[0]:
        batch["token_places"] = torch.stack([row["places"] for row in rows])  # (batch, tokens, 3)
    return batch


def train(run: Run) -> Result:
    """Trains a run. Returns its loss and the share of right answers of each kind in the test split."""
    frames, pooled, rows = load_frames(), {}, {}
    for split in ("train", "test"):
        clips, texts = compose(split)
        pooled[split] = pool_clips(run.method, split, clips, frames[split])
        rows[split] = [text | {name: x[text["clip"]] for name, x in pooled[split].items()} for text in texts]
    set_seed(run.seed)
    model, processor = build_captioner(run.connector, pooled["train"])
    features = pooled["train"]["features"]  # (videos, tokens, dim)
    model.whiten_vision_projection(features[:: max(1, len(features) // WHITENING_VIDEOS)].float())
    collator = partial(collate, processor)
    loader = DataLoader(rows["train"], TRAINING_BATCH, shuffle=True, drop_last=True, collate_fn=collator)
    loss = optimize(model.train(), itertools.chain.from_iterable(itertools.repeat(loader)), run.steps)
    right = find_right_answers(model.eval(), DataLoader(rows["test"], TEST_BATCH, collate_fn=collator))
    by_kind = defaultdict(list)
    for text, is_right in zip(rows["test"], right, strict=True):
        by_kind[text["kind"]].append(is_right)
    return {
        "training_loss": round(loss, 4),
        "held_out": {kind: round(mean(values), 4) for kind, values in by_kind.items()},
    }


def build_captioner(
    connector: str, pooled: dict[str, torch.Tensor]
) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor]:
    """The demo's towers with a fresh connector for pooled features."""
    vision, text = str(prepare_vision_tower()), str(prepare_language_model())
    num_tokens = pooled["features"].shape[1]
    kind, fields = connector_of(connector, round(num_tokens**0.5))
    fields |= {**CONNECTORS[connector], "max_position_embeddings": 256}
    if num_tokens == TOKENS:  # nothing is left to merge, and the tokens are no grid
        fields |= {"position_grid_size": None} | ({"merge_r": 0} if kind == "tomeformer" else {})
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        vision,
        text,
        connector_config=connector_fields(kind, {**fields, "class_token": False}),
        num_vision_tokens=num_tokens,
        video_mode="merge" if "places" in pooled else "mean",
    )
    tokenizer = AutoTokenizer.from_pretrained(text)
    tokenizer.chat_template = None  # a question follows the video, and its answer the question
    return model, EVLGenProcessor(load_image_processor(vision), tokenizer, num_image_tokens=TOKENS)


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
    """The model's output for a batch of [`collate`], in bfloat16. Logits are those of the answers' positions."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
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
