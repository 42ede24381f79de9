"""What `claims.py` found, as pictures and as a table."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = {
    "loss": "held-out loss [nats per token]",
    "gap": "more loss with wrong pictures",
    "cider": "CIDEr-D [percent]",
}
AXES = {"seconds": "training time [s on two cores]", "steps": "steps of 16", "flops": "floating-point operations"}
LOGARITHMIC = ("loss",)


def group_by_method(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results of the same method, at the same learning rate, with different seeds belong together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    rates = {(result["run"]["method"], result["run"]["learning_rate"]) for result in results}
    methods = [method for method, _ in rates]
    for result in results:
        method, rate = result["run"]["method"], result["run"]["learning_rate"]
        name = method if methods.count(method) == 1 else f"{method}, {rate:g}"
        groups.setdefault(name, []).append(result)
    return groups


def position(result: dict[str, Any], step: int, axis: str, step_seconds: dict[str, float] | None) -> float | None:
    """Where a step lies on an axis; BLIP-2's first stage counts. None where nothing was timed."""
    first = result["run"]["stage_one_steps"]
    if axis == "steps":
        return first + step
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
    panels[0, 0].legend(fontsize=7, title="method (seeds)", title_fontsize=7)
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
            f"{run['learning_rate']:g}",
            f"{run['stage_one_steps']} + {last}" if run["stage_one_steps"] else str(last),
            "?" if seconds is None else f"{seconds:.0f}",
            f"{position(runs[0], last, 'flops', None) / 1e15:.3f}",
            *(_spread([one["curve"][-1][name] for one in runs], digits) for name, digits in _DIGITS.items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_DIGITS = {"loss": 3, "gap": 2, "cider": 0, "exact": 2}


def _spread(values: list[float], digits: int) -> str:
    middle = f"{mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def comparison(results: list[dict[str, Any]], step_seconds: dict[str, float]) -> str:
    """EVLGen against each other method at equal seconds, as rows of Markdown.

    A checkpoint counts as won if EVLGen's worst seed is better there than the other's best, whose curves are
    interpolated linearly between checkpoints and stay what they are after the last.
    """
    groups = group_by_method(results)
    lines = [
        "| EVLGen against | checkpoints won: held-out loss | gap | its last loss is reached after |",
        "|---|---|---|---|",
    ]
    own = [_timed(run, step_seconds) for run in groups.pop("evlgen", [])]
    for method, runs in groups.items() if own else ():
        if position(runs[0], 1, "seconds", step_seconds) is None:
            continue
        others = [_timed(run, step_seconds) for run in runs]
        won = {"loss": 0, "gap": 0}
        compared = [time for time in own[0]["seconds"] if time >= others[0]["seconds"][0]]
        for time in compared:
            at = {name: [np.interp(time, one["seconds"], one[name]) for one in own] for name in won}
            there = {name: [np.interp(time, one["seconds"], one[name]) for one in others] for name in won}
            won["loss"] += max(at["loss"]) < min(there["loss"])
            won["gap"] += min(at["gap"]) > max(there["gap"])
        target = mean(one["loss"][-1] for one in others)
        losses = np.minimum.accumulate(np.mean([one["loss"] for one in own], axis=0))
        reached = "never"
        if losses[-1] <= target:
            seconds = np.interp(-target, -losses, own[0]["seconds"])
            reached = f"{seconds / others[0]['seconds'][-1]:.0%} of its time"
        total = len(compared)
        lines.append(f"| {method} | {won['loss']} of {total} | {won['gap']} of {total} | {reached} |")
    return "\n".join(lines)


def _timed(result: dict[str, Any], step_seconds: dict[str, float]) -> dict[str, list[float]]:
    seconds = [position(result, point["step"], "seconds", step_seconds) for point in result["curve"]]
    return {"seconds": seconds, **{name: [point[name] for point in result["curve"]] for name in ("loss", "gap")}}


def stage_one_table(results: list[dict[str, Any]]) -> str:
    """What BLIP-2's first stage has learned, on held-out pictures, for each learning rate, as rows of Markdown."""
    names = ("contrast", "matching", "captioning", "recall@1")
    lines = [f"| learning rate | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for result in results:
        cells = [f"{result['stage_one_held_out'][name]:.3f}" for name in names]
        lines.append(f"| {result['run']['learning_rate']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)
