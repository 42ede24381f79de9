"""Measures a training step of the demo beside other busy processes, for several settings of OpenMP.

    python -m benchmarks.busy_machine

OpenMP's threads spin while they wait for each other. Beside other processes, a thread then often spins while the
thread that it waits for cannot run. The scripts therefore let threads sleep soon (`examples/common/processes.py`).

Each setting has its own process, because OpenMP reads environment variables when PyTorch is loaded. The other busy
processes only count. Settings take turns, and medians are printed. Other work on the machine adds to every column.
"""

import os
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from unittest import mock

from configuration_evlgen import EVLGenConfig

from .markdown import markdown_table
from .timing import argument_parser, measure
from .training_step import SIZES, build, parts_of_a_step

SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_DYNAMIC=true": {"OMP_DYNAMIC": "true"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, rounds=5)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="Settings to compare.")
    parser.add_argument("--others", type=int, nargs="+", default=[0, 1, 2, 4], help="Numbers of other processes.")
    args = parser.parse_args(arguments)
    compare(SIZES["demo"]["EVLGen, front-loaded"], args.settings, args.others, args.rounds)


def compare(config: EVLGenConfig, settings: list[str], others: list[int], rounds: int) -> None:
    """Prints the median seconds of a step beside each number of other processes, also relative to the first row."""
    with ExitStack() as stack:
        steps = {setting: stack.enter_context(remote_step(config, SETTINGS[setting])) for setting in settings}
        seconds = measure_beside(steps, others, rounds)
    print(f"{os.cpu_count()} cores; seconds of a step (relative to the first row)\n")
    rows = []
    for setting in settings:
        cells = [(seconds[setting, count], seconds[settings[0], count]) for count in others]
        rows.append([setting, *(f"{value:.2f} ({value / first:.2f})" for value, first in cells)])
    print(markdown_table(["setting", *(f"{count} other processes" for count in others)], rows))


@contextmanager
def remote_step(config: EVLGenConfig, environment: dict[str, str]) -> Iterator[Connection]:
    """Starts a process that times a training step for each message, after a first step to warm up."""
    ours, theirs = get_context("spawn").Pipe()
    with mock.patch.dict(os.environ):
        for name in list(os.environ):
            if name.startswith(("OMP_", "GOMP_")):
                del os.environ[name]
        os.environ.update(environment)
        process = get_context("spawn").Process(target=_serve, args=(config, theirs), daemon=True)
        process.start()
    theirs.close()  # so that `recv` raises EOFError if the process dies
    ours.recv()
    yield ours
    ours.send("end")
    process.join()


def _serve(config: EVLGenConfig, connection: Connection) -> None:
    step = parts_of_a_step(build(config))["step"]
    step()
    connection.send("ready")
    while connection.recv() == "step":
        connection.send(measure(step))


def measure_beside(steps: dict[str, Connection], others: list[int], rounds: int) -> dict[tuple[str, int], float]:
    """Returns the median seconds of each setting beside each number of other processes."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(rounds):
        for count in others:
            shuffle(order)
            with busy_processes(count):
                for setting in order:
                    steps[setting].send("step")
                    times[setting, count].append(steps[setting].recv())
    return {key: statistics.median(values) for key, values in times.items()}


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
