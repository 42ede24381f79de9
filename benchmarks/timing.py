"""Times candidates side by side, so that a busy machine slows all of them alike."""

import random
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm


def measure(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(runs: dict[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each candidate over `rounds` rounds, after one to warm up.

    Each round has an order of its own: what comes behind a large candidate is slower, as memory was given back.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for turn in tqdm(range(rounds + 1), leave=False):
        shuffle(order)
        for name in order:
            seconds = measure(runs[name], device)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}
