"""Tables and curves of finished runs. A result is a line of `results.jsonl`; `step_seconds` are its timings."""

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np

from ..planned_runs import band
from ..timing import markdown_table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = {
    "loss": "held-out loss [nats per token]",
    "gap": "more loss with wrong images",
    "cider": "CIDEr-D (at most 1000)",
}
BATCH_SIZE = 16
AXES = {
    "seconds": "training time [s]",
    "steps": f"steps of {BATCH_SIZE} images",
    "flops": "floating-point operations",
}
_DIGITS = {"loss": 3, "gap": 2, "cider": 0, "exact": 2}

Result = dict[str, Any]
Curve = dict[str, np.ndarray]


def group_seeds(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Groups results that differ only in their seed, by method and learning rate (of both stages if there are two)."""
    groups = defaultdict(list)
    for result in results:
        run = result["run"]
        first = f"{run['stage_one_learning_rate']:g} then " if run["stage_one_steps"] else ""
        groups[run["method"], f"{first}{run['learning_rate']:g}"].append(result)
    return groups


def axis_value(result: Result, step: int, axis: str, step_seconds: dict[str, float] | None) -> float | None:
    """Position of a step on an axis, with BLIP-2's first stage included. None if the method was not timed."""
    run = result["run"]
    first = run["stage_one_steps"]
    if axis == "steps":
        return (first * run["stage_one_batch_size"] + step * BATCH_SIZE) / BATCH_SIZE
    if axis == "flops":
        return first * result.get("stage_one_flops_per_step", 0) + step * result["flops_per_step"]
    timed = run["method"].removesuffix("-tenth-of-data")  # fewer data do not change the time of a step
    if step_seconds is None or timed not in step_seconds:
        return None
    return first * step_seconds.get("stage-one", 0) + step * step_seconds[timed]


def draw_curves(results: list[Result], step_seconds: dict[str, float] | None, path: Path) -> None:
    """Draws each figure against each axis: the mean over seeds, and a band from the lowest to the highest seed."""
    axes = [axis for axis in AXES if axis != "seconds" or step_seconds is not None]
    size = (4.6 * len(axes), 3.4 * len(FIGURES))
    figure, panels = plt.subplots(len(FIGURES), len(axes), figsize=size, layout="constrained", squeeze=False)
    for row, (name, label) in zip(panels, FIGURES.items(), strict=True):
        for panel, axis in zip(row, axes, strict=True):
            for color, ((method, _), seeds) in enumerate(group_seeds(results).items()):
                steps = [point["step"] for point in seeds[0]["curve"] if name in point]
                # Without a value, as for a method that was not timed, nothing is drawn.
                x = np.array([axis_value(seeds[0], step, axis, step_seconds) for step in steps], float)
                values = np.array([[point[name] for point in seed["curve"] if name in point] for seed in seeds])
                style = {"color": f"C{color}", "marker": "o", "markersize": 3}
                panel.plot(x, values.mean(axis=0), label=f"{method} ({len(seeds)})", **style)
                panel.fill_between(x, values.min(axis=0), values.max(axis=0), color=f"C{color}", alpha=0.2)
            panel.set(xlabel=AXES[axis], ylabel=label, yscale="log" if name == "loss" else "linear")
            panel.grid(alpha=0.3, which="both")
    lines, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=4, fontsize=9, title="method (seeds)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(results: list[Result], step_seconds: dict[str, float] | None) -> str:
    """Markdown table of the last point of each curve: the mean over seeds, with the lowest and highest in brackets."""
    rows = []
    for (method, rates), seeds in group_seeds(results).items():
        run, last = seeds[0]["run"], seeds[0]["curve"][-1]["step"]
        steps = f"{run['stage_one_steps']} + {last}" if run["stage_one_steps"] else last
        seconds = axis_value(seeds[0], last, "seconds", step_seconds)
        flops = axis_value(seeds[0], last, "flops", None)
        cost = ["?" if seconds is None else f"{seconds:.0f}", f"{flops / 1e15:.3f}"]
        figures = [band([seed["curve"][-1][name] for seed in seeds], digits) for name, digits in _DIGITS.items()]
        rows.append([method, len(seeds), rates, steps, *cost, *figures])
    header = ["method", "seeds", "learning rate", "steps", "seconds", "PFLOP"]
    return markdown_table([*header, "held-out loss", "gap", "CIDEr-D", "exact"], rows)


def curve_table(results: list[Result]) -> str:
    """Markdown table of the held-out loss along each curve, and of exact captions where they were generated."""
    steps = [point["step"] for point in results[0]["curve"]]
    halfway = next(index for index, point in enumerate(results[0]["curve"]) if "exact" in point)
    rows = []
    for (method, _), seeds in group_seeds(results).items():
        losses = [band([seed["curve"][index]["loss"] for seed in seeds], 3) for index in range(len(steps))]
        exact = [f"{mean(seed['curve'][index]['exact'] for seed in seeds):.1%}" for index in (halfway, -1)]
        rows.append([method, *losses, *exact])
    exact_header = [f"exact after {steps[halfway]}", f"exact after {steps[-1]}"]
    return markdown_table(["held-out loss after", *steps, *exact_header], rows)


def comparison(results: list[Result], step_seconds: dict[str, float], method: str) -> str:
    """Markdown table that compares one method with each other method at equal seconds.

    Methods are compared at the checkpoints of both while both train, and after the end of each training. Between
    checkpoints, the gap and the logarithm of the loss are interpolated linearly. A checkpoint is won if the worst seed
    of `method` is better there than the best seed of the other method.
    """
    curves = [_curve(result, step_seconds) for result in results if result["run"]["method"] == method]
    rows = []
    for (other, _), other_results in group_seeds(results).items() if curves else ():
        if other == method or axis_value(other_results[0], 1, "seconds", step_seconds) is None:
            continue
        other_curves = [_curve(result, step_seconds) for result in other_results]
        ends = [band([np.exp(curve["log loss"][-1]) for curve in seeds], 4) for seeds in (curves, other_curves)]
        rows.append([other, *_checkpoints_won(curves, other_curves), *ends, _reached(curves, other_curves)])
    header = [f"{method} against", "checkpoints won: held-out loss", "gap", "held-out loss at the end", "the other's"]
    return markdown_table([*header, "the other's lowest loss is reached after"], rows)


def _curve(result: Result, step_seconds: dict[str, float]) -> Curve:
    """Seconds, logarithm of the loss and gap of each checkpoint: `(checkpoints,)`."""
    curve = result["curve"]
    return {
        "seconds": np.array([axis_value(result, point["step"], "seconds", step_seconds) for point in curve]),
        "log loss": np.log([point["loss"] for point in curve]),
        "gap": np.array([point["gap"] for point in curve]),
    }


def _checkpoints_won(curves: list[Curve], other_curves: list[Curve]) -> list[str]:
    """How many checkpoints the worst of `curves` wins against the best of `other_curves`, by loss and by gap."""
    seconds, other_seconds = curves[0]["seconds"], other_curves[0]["seconds"]
    start, end = max(seconds[0], other_seconds[0]), min(seconds[-1], other_seconds[-1])
    times = [time for time in np.union1d(seconds, other_seconds) if start <= time <= end]
    if not times:
        return ["none", "none"]
    won = []
    for name, sign in (("log loss", 1), ("gap", -1)):
        ours, theirs = (
            sign * np.array([np.interp(times, curve["seconds"], curve[name]) for curve in seeds])  # (seeds, times)
            for seeds in (curves, other_curves)
        )
        won.append(f"{(ours.max(axis=0) < theirs.min(axis=0)).sum()} of {len(times)}")
    return won


def _reached(curves: list[Curve], other_curves: list[Curve]) -> str:
    """When the mean loss of `curves` reaches the lowest one of `other_curves`, as a share of the time that took."""
    loss, other_loss = (np.mean([curve["log loss"] for curve in seeds], axis=0) for seeds in (curves, other_curves))
    lowest = int(np.argmin(other_loss))
    falling = np.minimum.accumulate(loss)
    if falling[-1] > other_loss[lowest]:
        return "never"
    seconds = np.interp(-other_loss[lowest], -falling, curves[0]["seconds"])
    return f"{seconds / other_curves[0]['seconds'][lowest]:.0%} of its time"


def stage_one_table(results: list[Result]) -> str:
    """Markdown table of the held-out figures of BLIP-2's first stage, for each of its learning rates."""
    names = ("contrast", "matching", "captioning", "recall@1")
    by_rate: dict[float, dict[str, float]] = {}
    for result in results:
        by_rate.setdefault(result["run"]["stage_one_learning_rate"], result["stage_one_held_out"])
    rows = [[f"{rate:g}", *(f"{figures[name]:.3f}" for name in names)] for rate, figures in by_rate.items()]
    return markdown_table(["learning rate", *names], rows)
