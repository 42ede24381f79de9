"""What `claims.py` found, as images and as a table."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np

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
LOGARITHMIC = ("loss",)


def group_by_method(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results of the same method, at the same learning rates, with different seeds belong together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    rates = {(run["method"], *_rates_of(run)) for run in (result["run"] for result in results)}
    methods = [method for method, *_ in rates]
    for result in results:
        run = result["run"]
        several = methods.count(run["method"]) > 1
        name = f"{run['method']}, {' then '.join(_rates_of(run))}" if several else run["method"]
        groups.setdefault(name, []).append(result)
    return groups


def _rates_of(run: dict[str, Any]) -> list[str]:
    """The learning rate, or both of two stages, as text."""
    first = [f"{run['stage_one_learning_rate']:g}"] if run["stage_one_steps"] else []
    return [*first, f"{run['learning_rate']:g}"]


def position(result: dict[str, Any], step: int, axis: str, step_seconds: dict[str, float] | None) -> float | None:
    """Where a step lies on an axis; BLIP-2's first stage counts. None where nothing was timed."""
    first = result["run"]["stage_one_steps"]
    if axis == "steps":
        return (first * result["run"]["stage_one_batch_size"] + step * BATCH_SIZE) / BATCH_SIZE
    if axis == "flops":
        return first * result.get("stage_one_flops_per_step", 0) + step * result["flops_per_step"]
    if step_seconds is None:
        return None
    timed = result["run"]["method"].removesuffix("-tenth-of-data")  # a step takes as long
    if timed not in step_seconds:
        return None
    return first * step_seconds.get("stage-one", 0) + step * step_seconds[timed]


def draw_curves(results: list[dict[str, Any]], step_seconds: dict[str, float] | None, path: Path) -> None:
    """Draws each figure against each axis: the mean over seeds, and a band from the lowest to the highest.

    Args:
        results: Finished runs on one data set.
        step_seconds: Seconds of a step of each method, and of `"stage-one"`.
        path: The PNG file to write.
    """
    groups = group_by_method(results)
    axes_names = [axis for axis in AXES if axis != "seconds" or step_seconds is not None]
    size = (4.6 * len(axes_names), 3.4 * len(FIGURES))
    figure, panels = plt.subplots(len(FIGURES), len(axes_names), figsize=size, layout="constrained", squeeze=False)
    for row, (name, label) in zip(panels, FIGURES.items(), strict=True):
        for panel, axis in zip(row, axes_names, strict=True):
            for color, (method, runs) in enumerate(groups.items()):
                steps = [point["step"] for point in runs[0]["curve"] if name in point]
                x = [position(runs[0], step, axis, step_seconds) for step in steps]
                curves = [[point[name] for point in run["curve"] if name in point] for run in runs]
                values = list(zip(*curves, strict=True))
                style = {"color": f"C{color}", "marker": "o", "markersize": 3}
                panel.plot(x, [mean(ones) for ones in values], label=f"{method} ({len(runs)})", **style)
                low, high = [min(ones) for ones in values], [max(ones) for ones in values]
                panel.fill_between(x, low, high, color=f"C{color}", alpha=0.2)
            panel.set(xlabel=AXES[axis], ylabel=label, yscale="log" if name in LOGARITHMIC else "linear")
            panel.grid(alpha=0.3, which="both")
    lines, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=4, fontsize=9, title="method (seeds)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(results: list[dict[str, Any]], step_seconds: dict[str, float] | None) -> str:
    """The last point of each method's curves, as rows of Markdown: mean over seeds, lowest to highest in brackets."""
    lines = [
        "| method | seeds | learning rate | steps | seconds | PFLOP | held-out loss | gap | CIDEr-D | exact |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for runs in group_by_method(results).values():
        run, last = runs[0]["run"], runs[0]["curve"][-1]["step"]
        seconds = position(runs[0], last, "seconds", step_seconds)
        cells = [
            runs[0]["run"]["method"],
            str(len(runs)),
            " then ".join(_rates_of(run)),
            f"{run['stage_one_steps']} + {last}" if run["stage_one_steps"] else str(last),
            "?" if seconds is None else f"{seconds:.0f}",
            f"{position(runs[0], last, 'flops', None) / 1e15:.3f}",
            *(_spread([one["curve"][-1][name] for one in runs], digits) for name, digits in _DIGITS.items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def curve_table(results: list[dict[str, Any]]) -> str:
    """The held-out loss along each method's curve, and exact captions where they were taken, as rows of Markdown."""
    steps = [point["step"] for point in results[0]["curve"]]
    halfway = next(at for at, point in enumerate(results[0]["curve"]) if "exact" in point)
    header = ["held-out loss after", *map(str, steps), f"exact after {steps[halfway]}", f"exact after {steps[-1]}"]
    lines = [f"| {' | '.join(header)} |", f"{'|---' * len(header)}|"]
    for method, runs in group_by_method(results).items():
        cells = [_spread([run["curve"][at]["loss"] for run in runs], 3) for at in range(len(steps))]
        cells += [f"{mean(run['curve'][at]['exact'] for run in runs):.1%}" for at in (halfway, -1)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


_DIGITS = {"loss": 3, "gap": 2, "cider": 0, "exact": 2}


def _spread(values: list[float], digits: int) -> str:
    middle = f"{mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def comparison(results: list[dict[str, Any]], step_seconds: dict[str, float], own: str) -> str:
    """One method against each other at equal seconds, as rows of Markdown.

    They are compared at the checkpoints of both, for as long as both train, and after the end of each. Between
    checkpoints a gap and the logarithm of a loss are interpolated linearly. A checkpoint is won if the worst seed of
    `own` is better there than the other's best seed.

    Args:
        results: Finished runs on one data set.
        step_seconds: Seconds of a step of each method, and of `"stage-one"`.
        own: The method that is compared with the others.
    """
    groups = group_by_method(results)
    lines = [
        f"| {own} against | checkpoints won: held-out loss | gap | held-out loss at the end | the other's "
        "| the other's lowest loss is reached after |",
        "|---|---|---|---|---|---|",
    ]
    mine = [_timed(run, step_seconds) for run in groups.pop(own, [])]
    for method, runs in groups.items() if mine else ():
        if position(runs[0], 1, "seconds", step_seconds) is None:
            continue
        others = [_timed(run, step_seconds) for run in runs]
        start, end = (pick(one["seconds"][at] for one in (mine[0], others[0])) for pick, at in ((max, 0), (min, -1)))
        times = sorted({time for one in (mine[0], others[0]) for time in one["seconds"] if start <= time <= end})
        lost = {}  # by how much the worst of one's own seeds is above the other's best: (checkpoints,)
        for name, sign in (("log loss", 1), ("gap", -1)):
            at, there = ([np.interp(times, one["seconds"], one[name]) for one in ones] for ones in (mine, others))
            lost[name] = np.max(sign * np.array(at), axis=0) - np.min(sign * np.array(there), axis=0)
        cells = [f"{(margins < 0).sum()} of {len(times)}" if times else "none" for margins in lost.values()]
        cells += [_spread([float(np.exp(one["log loss"][-1])) for one in ones], 4) for ones in (mine, others)]
        lines.append(f"| {method} | {' | '.join(cells)} | {_reached(mine, others)} |")
    return "\n".join(lines)


def _reached(mine: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """When one's own mean loss has come as low as the lowest of the other, as a share of the time that took."""
    own_curve, other_curve = (np.mean([one["log loss"] for one in ones], axis=0) for ones in (mine, others))
    lowest = int(np.argmin(other_curve))
    falling = np.minimum.accumulate(own_curve)
    if falling[-1] > other_curve[lowest]:
        return "never"
    seconds = np.interp(-other_curve[lowest], -falling, mine[0]["seconds"])
    return f"{seconds / others[0]['seconds'][lowest]:.0%} of its time"


def _timed(result: dict[str, Any], step_seconds: dict[str, float]) -> dict[str, list[float]]:
    curve = result["curve"]
    return {
        "seconds": [position(result, point["step"], "seconds", step_seconds) for point in curve],
        "log loss": [float(np.log(point["loss"])) for point in curve],
        "gap": [point["gap"] for point in curve],
    }


def stage_one_table(results: list[dict[str, Any]]) -> str:
    """What BLIP-2's first stage has learned, on held-out images, for each learning rate, as rows of Markdown."""
    names = ("contrast", "matching", "captioning", "recall@1")
    lines = [f"| learning rate | {' | '.join(names)} |", "|---|---|---|---|---|"]
    by_rate: dict[float, dict[str, float]] = {}
    for result in results:
        by_rate.setdefault(result["run"]["stage_one_learning_rate"], result["stage_one_held_out"])
    for rate, held_out in by_rate.items():
        lines.append(f"| {rate:g} | {' | '.join(f'{held_out[name]:.3f}' for name in names)} |")
    return "\n".join(lines)
