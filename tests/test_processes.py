"""examples/common/processes.py: threads that wait do not keep other processes from running."""

import os
import subprocess
import sys

import pytest

from .helpers import ROOT

# Prints how OpenMP's threads will wait, when PyTorch would load OpenMP, and stops.
CODE = """
import os, sys
class Stop:
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Stop)
import {script}
"""


def spin_count(script, **environment):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", CODE.format(script=script)]
    result = subprocess.run(command, cwd=ROOT / "examples", env=env | environment, capture_output=True, text=True)
    return result.stdout.strip()


@pytest.mark.parametrize(
    "script",
    ["pretrain", "finetune", "finetune_video", "train_scst", "evaluate_captioning", "evaluate_vqa", "caption_folder"],
)
def test_threads_sleep_soon_while_they_wait(script):
    assert spin_count(script) == "1000"


def test_users_choose_how_threads_wait():
    assert spin_count("pretrain", GOMP_SPINCOUNT="5") == "5"
    assert spin_count("pretrain", OMP_WAIT_POLICY="ACTIVE") == "None"
