"""How a script ends after an error, and how processes and threads share the cores of a machine."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# GNU's OpenMP lets a waiting thread spin 300,000 times before it sleeps. Beside other busy processes it mostly spins
# while the thread that it waits for cannot run, and a step takes several times as long. After 1,000 spins it does not,
# and an idle machine is as fast (docs/speed.md). OpenMP reads this when PyTorch is loaded, so scripts
# import this module first.
if "OMP_WAIT_POLICY" not in os.environ:  # somebody's own choice
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch


def use_all_cores(device: torch.device) -> None:
    """Shares the cores out among the processes of `accelerate launch`, which gives each one thread by default."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // processes))


def run_script(main: Callable[[], Any]) -> None:
    """Runs a script. A wrong input ends it with one line and exit code 2; `--debug` shows where the error arose."""
    options = sys.argv[1:]
    index = options.index("--debug") if "--debug" in options else None
    # With a value it is an argument of transformers' Trainer.
    debug = index is not None and (index + 1 == len(options) or options[index + 1].startswith("--"))
    if debug:
        sys.argv.remove("--debug")
    try:
        main()
    except (ValueError, TypeError, ImportError) as error:
        if debug:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
