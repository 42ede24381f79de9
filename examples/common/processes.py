"""Several processes on one machine."""

import os

import torch


def use_all_cores(device: torch.device) -> None:
    """Shares the cores out among the processes of `accelerate launch`, which leaves each one thread by default."""
    if device.type == "cpu" and {"ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"} <= os.environ.keys():
        if os.environ["OMP_NUM_THREADS"] != "1":
            return
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // processes))
