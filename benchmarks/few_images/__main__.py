"""How many images does a captioner need? The demo's goes on with a few images of things that it has never seen.

    python -m benchmarks.few_images --images 10 30 100 300 --seeds 0 1 2

trains `outputs/demo` by `examples/finetune.py` with `finetune-captions.yaml` on scenes of eight other drawings. It
trains what `benchmarks/few_images/results.jsonl` lacks, and prints a table. With `--old`, half of each batch are the
demo's own scenes. A run takes some two minutes of one core.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import mean
from typing import Any

import finetune
import numpy as np

from common.arguments import DataArguments, EVLGenTrainingArguments, GenerationArguments
from common.data.collator import CaptionCollator
from common.demo.scenes import RELATIONS, draw_scene, load_scenes, with_article
from common.evaluation.captions import generate_captions
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

from ..results import Result, band, markdown_table, read_results, spread, train_missing

RESULTS = Path(__file__).parent / "results.jsonl"
RECIPE = finetune.DEMO_RECIPE.parent / "finetune-captions.yaml"
THINGS = ("penguin", "octopus", "turtle", "butterfly", "elephant", "strawberry", "bicycle", "umbrella")
TEST_IMAGES = 100  # held-out scenes of the new things, and of the old ones


@dataclass(frozen=True)
class Run:
    images: int
    old: bool  # half of each batch are the demo's own scenes
    seed: int

    @property
    def steps(self) -> int:
        """Steps of 16 images: the recipe's 10 epochs, or 60 if that is more. Twice as many with old images."""
        return max(60, math.ceil(10 * self.images / 16)) * (1 + self.old)

    @property
    def name(self) -> str:
        return f"{self.images}{'.old' if self.old else ''}.seed{self.seed}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/demo", help="The demo's captioner. Default: outputs/demo.")
    parser.add_argument("--images", nargs="+", type=int, default=[10, 30, 100, 300], help="Numbers of images.")
    parser.add_argument("--old", action="store_true", help="Mix in the demo's scenes.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Default: 0.")
    arguments = parser.parse_args(argv)
    runs = [Run(images, arguments.old, seed) for seed in arguments.seeds for images in arguments.images]
    train_missing(runs, RESULTS, lambda run: train(run, arguments.model))
    print(table(read_results(RESULTS)))


def train(run: Run, model: str) -> dict[str, Any]:
    """Trains a run. Returns the shares of right captions for new and for old things, and the minutes of training."""
    with tempfile.TemporaryDirectory() as folder:
        data, output = Path(folder) / "scenes", Path(folder) / "model"
        for split, count in {"train": run.images, "test": TEST_IMAGES}.items():
            save_scenes(data / split, new_scenes(split, count, run.seed))
        words = ["--config", RECIPE, "--model", model, "--dataset", data, "--output_dir", output, "--seed", run.seed]
        words += ["--max_steps", run.steps, "--eval_strategy", "no"]
        if run.old:
            entries = [{"dataset": str(data), "weight": 1}, {"dataset": "openmoji-scenes", "weight": 1}]
            (Path(folder) / "mixture.json").write_text(json.dumps(entries))  # JSON is YAML
            words += ["--mixture", Path(folder) / "mixture.json"]
        started = time.time()
        metrics = finetune.main([*map(str, words), "--disable_tqdm", "true"])
        minutes = (time.time() - started) / 60
        return {"new": metrics["test_exact_captions"], "old": old_share(output), "minutes": round(minutes, 1)}


def new_scenes(split: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Scenes of new things, an even number of each. The test split has pairs that training never shows together."""
    opposite = {frozenset((thing, THINGS[(index + 4) % 8])) for index, thing in enumerate(THINGS)}
    pairs = [pair for pair in permutations(THINGS, 2) if (frozenset(pair) in opposite) == (split == "test")]
    rng = np.random.default_rng((seed, split == "test"))
    for index in range(count):
        if index % len(pairs) == 0:
            order = rng.permutation(len(pairs))
        first, second = pairs[order[index % len(pairs)]]
        relation = rng.choice(list(RELATIONS))
        image, _ = draw_scene(first, second, RELATIONS[relation], rng)
        yield {"image": image, "caption": f"{with_article(first)} {relation} {with_article(second)}"}


def save_scenes(folder: Path, scenes: Iterator[dict[str, Any]]) -> None:
    """Saves images and a `metadata.jsonl`, as a user would."""
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for index, scene in enumerate(scenes):
            scene["image"].save(folder / f"{index}.png")
            file.write(json.dumps({"file_name": f"{index}.png", "caption": scene["caption"]}) + "\n")


def old_share(folder: str | Path) -> float:
    """The share of the demo's own held-out scenes, whose captions are exactly right."""
    model = EVLGenForConditionalGeneration.from_pretrained(folder)
    data_args = DataArguments()
    collator = CaptionCollator(EVLGenProcessor.from_pretrained(folder), data_args, training=False)
    rows = load_scenes()["test"].select(range(TEST_IMAGES))
    args = EVLGenTrainingArguments(output_dir=str(folder), per_device_eval_batch_size=50, bf16=True)
    captions = generate_captions(model, rows, collator, GenerationArguments(), args)
    return mean(caption == row["caption"] for caption, row in zip(captions, rows, strict=True))


def table(results: dict[str, Result]) -> str:
    """Means over seeds of exactly right captions in %, with the lowest and the highest in brackets."""
    groups: dict[tuple[bool, int], list[Result]] = {}
    for result in results.values():
        groups.setdefault((result["run"]["old"], result["run"]["images"]), []).append(result)
    header = ["new images", "old images", "steps", "seeds", "new things right", "old things right", "minutes"]
    rows = [
        [images, "in each batch" if old else "none", Run(images, old, 0).steps, len(seeds)]
        + [spread([seed[name] for seed in seeds]) for name in ("new", "old")]
        + [band([seed["minutes"] for seed in seeds], 1)]
        for (old, images), seeds in sorted(groups.items())
    ]
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
