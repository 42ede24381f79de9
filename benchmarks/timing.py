"""Measures candidates: seconds, floating-point operations and peak memory."""

import random
import resource
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


def measure(run: Callable[[], Any]) -> float:
    """Seconds of one run."""
    start = timer()  # waits for a GPU, if there is one
    run()
    return timer() - start


def take_turns(runs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median seconds of each candidate over `rounds` rounds, after one round to warm up.

    Candidates take turns, so that other processes slow all of them alike. Each round has its own random order: after a
    large candidate the next one is slower, as memory was given back to the system.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for turn in tqdm(range(rounds + 1), leave=False):
        shuffle(order)
        for name in order:
            seconds = measure(runs[name])
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def count_flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of all matrix products, including those of attention."""
    # PyTorch does not count its fused attention on a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the result of a function that runs in a new process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_megabytes() -> float:
    """The most memory that this process has held so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
