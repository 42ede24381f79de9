"""Tables and curves of the finished runs. A result is a line of `results.jsonl`."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from ..planned_runs import Result, band, spread
from ..timing import markdown_table
from .connector_settings import VIEW
from .scene_questions import KINDS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FIGURES = ("names", "exact", *KINDS)  # shares, printed in %


class Cost(NamedTuple):
    """What a training step costs: operations, and seconds on one core."""

    flops: int
    seconds: float


def group_by_method(results: list[Result]) -> dict[tuple[str, int | None], list[Result]]:
    """Groups results of one set of scenes that differ only in their seed, by method and trained budget."""
    groups = defaultdict(list)
    for result in results:
        groups[result["run"]["method"], result["run"]["budget"]].append(result)
    return groups


def budget_table(results: list[Result], figure: str) -> str:
    """Markdown table of a held-out figure: a row for each method, a column for each number of tokens."""
    budgets = sorted({int(budget) for result in results for budget in result["held_out"]})
    rows = []
    for (method, budget), seeds in group_by_method(results).items():
        name = method if budget is None else f"{method}, trained for {budget} alone"
        values = [[seed["held_out"].get(str(number), {}).get(figure) for seed in seeds] for number in budgets]
        rows.append([name, len(seeds), *("" if None in shares else spread(shares) for shares in values)])
    return markdown_table(["method", "seeds", *budgets], rows)


def overlooked_table(results: list[Result], budget: int) -> str | None:
    """Markdown table of what the view of 224 pixels gets wrong: the share of it that each method gets right."""
    views = [result["held_out"] for result in results if result["run"]["method"] == VIEW]
    if not views:
        return None
    rights = (view[max(view, key=int)]["right"] for view in views)  # with the most tokens
    overlooked = [set(answers) == {"0"} for answers in zip(*rights, strict=True)]
    rows = []
    for (method, trained), seeds in group_by_method(results).items():
        rights = [seed["held_out"][str(budget)]["right"] for seed in seeds if str(budget) in seed["held_out"]]
        if rights and trained is None:
            shares = [_share_right(rights, overlooked, of) for of in (True, False)]
            rows.append([method, len(rights), *map(spread, shares)])
    header = ["method", "seeds", f"right of the {sum(overlooked)} that it gets wrong", "of the others"]
    return markdown_table(header, rows)


def _share_right(rights: list[str], overlooked: list[bool], of: bool) -> list[float]:
    """For each seed the share of right texts among those that were overlooked, or among the others."""
    return [mean(int(r) for r, wrong in zip(right, overlooked, strict=True) if wrong == of) for right in rights]


def size_table(results: list[Result]) -> str:
    """Markdown table of the connector's parameters, and the operations of a step at its `reference_budget`."""
    rows = []
    for (method, budget), (first, *_) in group_by_method(results).items():
        if budget is None:
            rows.append(
                [method, f"{first['connector_parameters'] / 1e6:.1f} M", f"{first['flops_per_step'] / 1e9:.0f}"]
            )
    return markdown_table(["method", "connector", "GFLOP a step"], rows)


def step_table(costs: dict[str, dict[int, Cost]]) -> str:
    """Markdown table of steps: a row for each method, a column for each number of tokens.

    Cells have the operations in GFLOP, and the time relative to the table's first.
    """
    cells = {method: [(cost.flops / 1e9, cost.seconds) for cost in steps.values()] for method, steps in costs.items()}
    unit = next(iter(cells.values()))[0][1]
    rows = [[method, *(f"{flops:.0f}; {time / unit:.2f}" for flops, time in row)] for method, row in cells.items()]
    return markdown_table(["method", *next(iter(costs.values()))], rows)


def caption_table(results: list[Result]) -> str:
    """Markdown table of the caption runs: losses in nats per token, named drawings (F1) and exact captions in %."""
    groups = defaultdict(list)
    for result in results:
        run = result["run"]
        trained = "any number" if run["tokens"] is None else "this number"
        for tokens, figures in result["held_out"].items():
            drawings = "stamps" if run.get("stamps") else "OpenMoji"
            groups[run["method"], drawings, run["steps"], tokens, trained].append(figures)
    rows = [
        [
            *group,
            len(seeds),
            *(band([seed[name] for seed in seeds], 2) for name in ("test_loss", "test_loss_gap")),
            *(spread([seed[name] for seed in seeds]) for name in ("names", "test_exact_captions")),
        ]
        for group, seeds in groups.items()
    ]
    header = ["method", "drawings", "steps", "tokens", "trained for", "seeds", "held-out loss", "gap"]
    return markdown_table([*header, "names", "exact"], rows)


def draw_curves(results: list[Result], costs: dict[str, dict[int, Cost]], path: Path) -> None:
    """Draws figures against tokens, operations and time: the mean over seeds, and a band of all seeds.

    Methods without costs are left out.
    """
    labels = {"names": "drawings named (F1) [%]", "exact": "all drawings right [%]"}
    figure, panels = plt.subplots(len(labels), 3, figsize=(14, 6), layout="constrained", sharey="row")
    for row, (name, label) in zip(panels, labels.items(), strict=True):
        row[0].set_ylabel(label)
        for color, ((method, budget), seeds) in enumerate(group_by_method(results).items()):
            if budget is None and method in costs:
                steps = costs[method]
                shares = [[100 * seed["held_out"][str(number)][name] for seed in seeds] for number in steps]
                axes = zip(*((number, cost.flops / 1e9, cost.seconds) for number, cost in steps.items()), strict=True)
                for panel, x in zip(row, axes, strict=True):
                    _draw_band(panel, x, shares, f"C{color}", f"{method} ({len(seeds)})")
        for panel in row:
            panel.set(xscale="log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    x_labels = ("tokens of the soft prompt", "GFLOP of a step, without the tower", "seconds of a step, one core")
    for panel, label in zip(panels[-1], x_labels, strict=True):
        panel.set(xlabel=label)
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right upper", title="method (seeds)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_band(panel: Axes, x: Sequence[float], shares: list[list[float]], color: str, label: str) -> None:
    panel.plot(x, [mean(seeds) for seeds in shares], marker="o", color=color, label=label)
    panel.fill_between(x, [min(seeds) for seeds in shares], [max(seeds) for seeds in shares], color=color, alpha=0.2)
