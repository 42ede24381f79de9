"""Settings of all tests, and the report on attacks: `python -m pytest -m attack`.

An attack gives bad input, damages a file, kills a process or disturbs a thread, and expects a named error or an
unharmed result. Attacks are found by the error that a test expects, or by the test's name.
"""

import inspect
import re
from collections import Counter

import datasets
import pytest
import torch

datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # it waits for pyarrow after each Parquet file that it streams
torch.set_num_threads(1)  # tiny models lose more to waiting threads than they gain
ATTACK = re.compile("kill|damag|cut_off|broken|link|foreign|thread|stale|replaced|sign_flip|time_out|two_runs")
# Files that start processes and take longest. They come first, so that no worker is left alone with one at the end.
SLOW_FILES = ("docs", "app", "distributed", "pretrain", "checkpoints", "caption_folder", "export_web", "streaming")
SLOW_FILES += ("many_machines", "caption_with_ray", "hub", "old_transformers", "export")


def pytest_collection_modifyitems(items):
    slow = {f"test_{name}": rank for rank, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: slow.get(item.path.stem, len(slow)))  # stable
    for item in items:
        if item.path.stem == "transformers_suite":  # tests of others, some without source
            continue
        if ATTACK.search(item.name) or "pytest.raises" in inspect.getsource(item.function):
            item.add_marker(pytest.mark.attack)
            item.user_properties.append(("attack on", item.path.stem.removeprefix("test_")))


def pytest_terminal_summary(terminalreporter, config):
    """Prints attacks tried, handled and wrong by area, if only attacks were selected."""
    if config.option.markexpr != "attack":
        return
    counts = {outcome: Counter() for outcome in ("passed", "failed")}
    for outcome, areas in counts.items():
        for report in terminalreporter.stats.get(outcome, []):
            areas.update(area for name, area in report.user_properties if name == "attack on")
    terminalreporter.section("attacks")
    for area in sorted(counts["passed"] | counts["failed"]):
        handled, wrong = counts["passed"][area], counts["failed"][area]
        terminalreporter.line(f"{area:30} {handled + wrong:4} tried {handled:4} handled {wrong:4} wrong")
    handled, wrong = (counts[outcome].total() for outcome in ("passed", "failed"))
    terminalreporter.line(f"{'all':30} {handled + wrong:4} tried {handled:4} handled {wrong:4} wrong")
