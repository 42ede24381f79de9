"""What `claims.py` found, as pictures and as a table."""

from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

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
    """Results of the same method with different seeds belong together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["run"]["method"], []).append(result)
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
    method = result["run"]["method"]
    timed = method if method in step_seconds else "evlgen"  # with less data a step takes as long
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
    for method, runs in group_by_method(results).items():
        run, last = runs[0]["run"], runs[0]["curve"][-1]["step"]
        seconds = position(runs[0], last, "seconds", step_seconds)
        cells = [
            method,
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
