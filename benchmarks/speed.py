"""Measures time and memory on this machine, and prints a table of docs/speed.md.

    python -m benchmarks.speed connectors

The first argument says what is measured:

- connectors: TomeFormer, BERT and Q-Former of BERT-base's size, alone
- steps: a training step and generation with each connector, beside the same frozen towers
- texts: a step with five captions or questions of each image in one row, beside a row for each

Candidates take turns, so that other processes slow all of them alike. Times are medians. Most models have the size of
the demo, and random weights.
"""

import argparse
from functools import partial
from itertools import repeat
from typing import Any

import torch

from configuration_evlgen import EVLGenConfig

from .models import (
    BATCH,
    CAPTION,
    EVA_WIDTH,
    PROMPT,
    SIZES,
    Step,
    bert_base_connectors,
    build,
    forward_and_backward,
    generation,
    random_batch,
    random_step,
    share_towers,
    training_step,
)
from .results import markdown_table
from .timing import in_new_process, peak_megabytes, take_turns

FRONT_LOADED = {257: [128, 64, 32, 4], 577: [288, 144, 72, 36, 8]}  # leave 29 tokens, as r = 19 does of 257


def compare_connectors(rounds: int) -> None:
    """They read EVA ViT-g's tokens, 257 of an image of 224 pixels or 577 of one of 336, in float32."""
    for num_tokens, front_loaded in FRONT_LOADED.items():
        models = bert_base_connectors(num_tokens, front_loaded)
        tokens = torch.randn(2, num_tokens, EVA_WIDTH)
        with torch.no_grad():
            lengths = [model(tokens).shape[1] for model in models.values()]
            forward = take_turns({name: partial(model, tokens) for name, model in models.items()}, rounds)
        steps = {name: partial(forward_and_backward, model, tokens) for name, model in models.items()}
        columns = [_relative(times) for times in (forward, take_turns(steps, rounds))]
        print(f"\n{num_tokens} tokens, {torch.get_num_threads()} threads\n")
        header = ["connector", "tokens out", "forward", "forward and backward"]
        print(markdown_table(header, zip(models, lengths, *columns, strict=True)))


def _relative(seconds: dict[Any, float]) -> list[str]:
    """Times relative to the first one."""
    first = next(iter(seconds.values()))
    return [f"{value / first:.2f}" for value in seconds.values()]


# steps: batches of 16 images, cached features, bfloat16 autocast, a language model like SmolLM2-135M


def compare_steps(rounds: int) -> None:
    for size, configs in SIZES.items():
        # Before this process grows: on Linux, a new process starts with its parent's peak as its own.
        peaks = [in_new_process(_peak_of_a_step, config) for config in configs.values()]
        models = {name: build(config) for name, config in configs.items()}
        share_towers(list(models.values()))
        encode = torch.autocast("cpu", dtype=torch.bfloat16)(next(iter(models.values())).get_vision_features)
        runs: dict[Any, Step] = {"tower": partial(encode, torch.randn(BATCH, 3, 224, 224))}
        for name, model in models.items():
            runs |= {(name, "step"): random_step(model), (name, "generation"): generation(model)}
        seconds = take_turns(runs, rounds)
        steps, generations = ({name: seconds[name, part] for name in models} for part in ("step", "generation"))
        rows = zip(
            models,
            [model.config.num_image_tokens for model in models.values()],
            _relative(steps),
            [f"{BATCH / (step + seconds['tower']):.1f}" for step in steps.values()],
            [f"{peak:.0f}" for peak in peaks],
            _relative(generations),
            strict=True,
        )
        print(f"\n{size}, {torch.get_num_threads()} threads\n")
        header = ["connector", "tokens", "step", "images/s", "peak [MB]", "5 beams"]
        print(markdown_table(header, rows))


def _peak_of_a_step(config: EVLGenConfig) -> float:
    """Peak memory of one step in MB, beyond that of the process before it."""
    step = random_step(build(config))
    before = peak_megabytes()
    step()
    return peak_megabytes() - before


# texts: the demo's model, with five texts for each of 16 images

TEXTS = {"captions of 10 tokens": (PROMPT, 0, CAPTION), "questions of 10 tokens, answers of 3": (0, PROMPT, 3)}


def compare_texts(rounds: int) -> None:
    """Pairs per second relative to separate rows with fused attention (sdpa) in the language model."""
    model = build(SIZES["demo"]["EVLGen, front-loaded"])
    layouts = [(shared, attention) for shared in (False, True) for attention in ("sdpa", "eager")]
    rows = []
    for name, lengths in TEXTS.items():
        for cached in (True, False):
            steps = {}
            for shared in (False, True):
                batch = random_batch(model, BATCH, 5, *lengths, shared=shared)
                if not cached:
                    batch["pixel_values"] = torch.randn(len(batch.pop("vision_features")), 3, 224, 224)
                steps[shared] = training_step(model, repeat(batch))

            def run(shared: bool, attention: str, steps: dict[bool, Step] = steps) -> None:
                model.language_model.set_attn_implementation(attention)
                steps[shared]()

            seconds = take_turns({layout: partial(run, *layout) for layout in layouts}, rounds)
            ratios = [f"{seconds[layouts[0]] / value:.2f}" for value in seconds.values()]
            rows.append([f"{name}, {'cached features' if cached else 'with the tower'}", *ratios])
    print(f"{torch.get_num_threads()} threads\n")
    header = [f"{'shared' if shared else 'separate'}, {attention}" for shared, attention in layouts]
    print(markdown_table(["five texts an image", *header], rows))


STOPWATCHES = {"connectors": compare_connectors, "steps": compare_steps, "texts": compare_texts}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=STOPWATCHES, help="What is measured.")
    parser.add_argument("--rounds", type=int, default=7, help="Rounds over which medians are taken.")
    arguments = parser.parse_args(argv)
    STOPWATCHES[arguments.what](arguments.rounds)


if __name__ == "__main__":
    main()
