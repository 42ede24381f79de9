"""Measures a training step of the demo beside other busy processes, for several settings of OpenMP.

    python -m benchmarks.busy_machine

OpenMP's threads spin while they wait for each other. Beside other processes, a thread then often spins while the
thread that it waits for cannot run. The scripts therefore let threads sleep soon (`examples/common/processes.py`).

Each setting has its own process, because OpenMP reads environment variables when PyTorch is loaded. The other busy
processes only count. Settings take turns, and medians are printed. Other work on the machine adds to every column.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from unittest import mock

from configuration_evlgen import EVLGenConfig

from .timing import argument_parser, markdown_table, take_turns
from .training_step import SIZES, Step, build, parts_of_a_step

SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_DYNAMIC=true": {"OMP_DYNAMIC": "true"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
OTHERS = (0, 1, 2, 4)  # numbers of other processes
_steps: list[Step] = []  # of a process that `remote_step` has started


def main(arguments: list[str] | None = None) -> None:
    compare(SIZES["demo"]["EVLGen, front-loaded"], argument_parser(__doc__, rounds=5).parse_args(arguments).rounds)


def compare(config: EVLGenConfig, rounds: int) -> None:
    """Prints the median seconds of a step beside each number of other processes, also relative to the first row."""
    with ExitStack() as stack:
        steps = {setting: stack.enter_context(remote_step(config, SETTINGS[setting])) for setting in SETTINGS}
        columns = []  # seconds by setting, for each number of other processes
        for count in OTHERS:
            with busy_processes(count):
                columns.append(take_turns(steps, rounds))
    first = next(iter(SETTINGS))
    print(f"{os.cpu_count()} cores; seconds of a step (relative to the first row)\n")
    rows = [
        [setting, *(f"{seconds[setting]:.2f} ({seconds[setting] / seconds[first]:.2f})" for seconds in columns)]
        for setting in SETTINGS
    ]
    print(markdown_table(["setting", *(f"{count} other processes" for count in OTHERS)], rows))


@contextmanager
def remote_step(config: EVLGenConfig, environment: dict[str, str]) -> Iterator[Callable[[], None]]:
    """Starts a process with a setting of OpenMP. Gives a function that runs a training step there."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, others | environment, clear=True):
            pool.submit(_build, config).result()  # the first call starts the process
        yield lambda: pool.submit(_run).result()


def _build(config: EVLGenConfig) -> None:
    _steps.append(parts_of_a_step(build(config))["step"])


def _run() -> None:
    _steps[0]()


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keeps processes running that do nothing but count."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
