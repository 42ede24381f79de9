"""examples/common/processes.py: threads that wait do not keep other processes from running; how scripts end."""

import os
import subprocess
import sys

import pytest

from common.processes import run_script

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


def stops(error):
    raise error


@pytest.mark.parametrize(
    "error", [ValueError("`model` is\n 'x'"), TypeError("`model` is 'x'"), ImportError("`model` is 'x'")]
)
def test_an_error_of_the_input_is_one_line_and_a_traceback_where_it_is_wanted(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["examples/pretrain.py", "--model", "x"])
    with pytest.raises(SystemExit) as end:
        run_script(lambda: stops(error))
    assert end.value.code == 2 and capsys.readouterr().err == "pretrain.py: error: `model` is 'x'\n"
    for options in (["--debug"], ["--debug", "--model", "x"]):
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *options])
        with pytest.raises(type(error), match="`model` is"):
            run_script(lambda: stops(error))
        assert "--debug" not in sys.argv
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--debug", "underflow_overflow"])  # the Trainer's own argument
    with pytest.raises(SystemExit):
        run_script(lambda: stops(error))
    assert sys.argv[1:] == ["--debug", "underflow_overflow"]
    with pytest.raises(RuntimeError, match="a bug"):
        run_script(lambda: stops(RuntimeError("a bug")))


@pytest.mark.attack
def test_a_script_ends_with_the_line_alone():
    script = ROOT / "examples" / "visualize_merging.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    command = [sys.executable, str(script), "--model", "/nowhere", "--images", "a.png"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "visualize_merging.py: error: `model`='/nowhere' cannot be loaded"
    )


def test_every_script_ends_so():
    for script in (ROOT / "examples").glob("*.py"):
        code = script.read_text()
        assert "__main__" not in code or code.rstrip().endswith("run_script(main)"), script.name
