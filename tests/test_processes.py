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


SCRIPTS = ["pretrain", "finetune", "finetune_video", "train_scst"]
SCRIPTS += ["evaluate_captioning", "evaluate_vqa", "caption_folder"]


@pytest.mark.parametrize(
    ("script", "chosen", "expected"),
    [(script, {}, "1000") for script in SCRIPTS]
    + [("pretrain", {"GOMP_SPINCOUNT": "5"}, "5"), ("pretrain", {"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_sleep_soon_while_they_wait_unless_a_user_chooses(script, chosen, expected):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))} | chosen
    command = [sys.executable, "-c", CODE.format(script=script)]
    result = subprocess.run(command, cwd=ROOT / "examples", env=env, capture_output=True, text=True)
    assert result.stdout.strip() == expected
