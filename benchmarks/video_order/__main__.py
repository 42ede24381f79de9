"""Compares ways to pool the frames of a video on questions that need their order, or one single frame.

    python -m benchmarks.video_order

trains all runs below and prints their tables. A run takes about 6 minutes on one core, or 23 with a contextualizer.
The first run of a method also pools all videos, and merging them takes 10 minutes more. Each finished run is a line of
`benchmarks/video_order/results.jsonl`. A command that was stopped continues with the next run.
`--report` prints the tables alone.

Videos are composed of the features of animated emoji, at one frame a second, and pooled to at most 196 tokens. A
connector turns them into 36 tokens. The temporal contextualizer is part of a vision transformer, but the demo's tower
is a CNN. So it is in two transformer blocks that are trained on the features of frames; see `frame_blocks.py`.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from ..results import Result, markdown_table, read_results, spread, train_missing
from .clip_pooling import METHODS
from .frame_blocks import CONTEXTUALIZERS
from .order_run import OrderRun, train
from .ordered_clips import BACKGROUND_VIDEOS, MOMENT, MOMENTS_ORDER, SHORT_KINDS

RESULTS = Path(__file__).parent / "results.jsonl"
SEEDS = (0, 1, 2)
PLAN = [OrderRun(method, seed) for seed in SEEDS for method in (*METHODS, *CONTEXTUALIZERS)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="Print the tables of the finished runs.")
    if not parser.parse_args(argv).report:
        train_missing(PLAN, RESULTS, train)
    report()


def report() -> None:
    """Prints the share of right answers of each method, in %: the mean over seeds, the lowest and the highest."""
    results = read_results(RESULTS)
    methods = defaultdict(list)
    for run in PLAN:
        if run.name in results:
            methods[run.method].append(results[run.name])
    print(f"\nShort videos\n\n{accuracy_table(methods, dict(zip(SHORT_KINDS, SHORT_KINDS, strict=True)))}")
    for kind in (MOMENT, MOMENTS_ORDER):
        columns = {f"{length} frames": f"{kind}, {length}" for length in BACKGROUND_VIDEOS["test"]}
        print(f"\nOn a background: {kind}\n\n{accuracy_table(methods, columns)}")


def accuracy_table(methods: dict[str, list[Result]], columns: dict[str, str]) -> str:
    """Markdown table of shares of right answers: a row for each method. `columns` has the kind for each header."""
    rows = []
    for method, seeds in methods.items():
        shares = [spread([seed["held_out"][kind] for seed in seeds]) for kind in columns.values()]
        rows.append([method, len(seeds), *shares])
    return markdown_table(["method", "seeds", *columns], rows)


if __name__ == "__main__":
    main()
