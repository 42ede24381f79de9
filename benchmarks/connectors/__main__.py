"""Trains connectors of the same size on the demo's data sets, and prints the tables of the docs.

    python -m benchmarks.connectors --dataset crowded-scenes --methods evlgen qformer --seeds 0 1 2

trains what `benchmarks/connectors/results.jsonl` lacks, and appends a line for each run, with its commit. Then a table
of each data set is printed. A run takes from 5 minutes to an hour on one core. To train one again, remove its line.

Older lines also hold methods, sweeps, ablations and runs with a small reader, whose code was deleted. The `commit` of
a line is the first one that has its figures.

Vision features are cached, so the tower's time and operations are not counted.
"""

import argparse
from pathlib import Path
from statistics import mean

from ..results import Result, band, markdown_table, read_results, spread, train_missing
from .methods import DATASETS, METHODS
from .training_run import Run, train

RESULTS = Path(__file__).parent / "results.jsonl"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="openmoji-scenes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="Default: all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Default: 0.")
    arguments = parser.parse_args(argv)
    runs = [Run(method, arguments.dataset, seed) for seed in arguments.seeds for method in arguments.methods]
    train_missing(runs, RESULTS, train)
    results = read_results(RESULTS)
    for dataset in DATASETS:
        if table := figures_table(results, dataset):
            print(f"\n{dataset}\n\n{table}")


def figures_table(results: dict[str, Result], dataset: str) -> str | None:
    """Markdown table of a data set's main runs: means over seeds, with the lowest and the highest in brackets.

    Held-out losses are in nats per token. The gap is how much higher the last one is with wrong images. Exact captions
    and named drawings (F1) are in %. Operations and time are those of a whole training. Time is relative to EVLGen's.
    """
    data, step_seconds = DATASETS[dataset], results.get(f"timing.{dataset}", {}).get("seconds", {})
    rows = []
    for method in METHODS:
        seeds = [result for result in results.values() if is_main_run(result, dataset, method)]
        if not seeds:
            continue
        curves = [{point["step"]: point for point in seed["curve"]} for seed in seeds]
        ends = [curve[data.caption_steps[-1]] for curve in curves]
        row = {"method": method, "seeds": len(seeds)}
        row |= {f"loss at {step}": band([curve[step]["loss"] for curve in curves], 3) for step in data.caption_steps}
        row["gap"] = f"{mean(end['gap'] for end in ends):.2f}"
        shares = {step: [curve[step]["exact"] for curve in curves] for step in data.caption_steps}
        row |= {f"exact at {step}": spread(values, 1) for step, values in shares.items()}
        if "named" in ends[0]:
            row["named"] = spread([end["named"] for end in ends])
        if step_seconds:
            row["PFLOP"] = f"{mean(map(training_flops, seeds)) / 1e15:.3f}"
            row["time"] = relative_time(seeds[0], step_seconds)
        rows.append(row)
    return markdown_table(list(rows[0]), [row.values() for row in rows]) if rows else None


def is_main_run(result: Result, dataset: str, method: str) -> bool:
    """Whether a line is no timing, and no run of a sweep or an ablation."""
    run = {"group": "main", **result.get("run", {})}
    return (run["group"], run.get("dataset"), run.get("method")) == ("main", dataset, method)


def training_flops(result: Result) -> float:
    steps, first = result["curve"][-1]["step"], stage_one_steps(result)
    return steps * result["flops_per_step"] + first * result.get("stage_one_flops_per_step", 0)


def relative_time(result: Result, step_seconds: dict[str, float]) -> str:
    """The time of a training relative to EVLGen's, by the measured seconds of a step. Empty without a measurement."""
    method = result["run"]["method"]
    if method not in step_seconds:
        return ""
    steps, first = result["curve"][-1]["step"], stage_one_steps(result)
    seconds = steps * step_seconds[method] + first * step_seconds["stage-one"]
    return f"{seconds / (steps * step_seconds['evlgen']):.2f}"


def stage_one_steps(result: Result) -> int:
    return result.get("stage_one_steps", result["run"].get("stage_one_steps", 0))  # older lines have it in `run`


if __name__ == "__main__":
    main()
