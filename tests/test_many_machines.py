"""docs/many_machines.md: Slurm's script, with two launchers on this machine as its machines, and data behind URLs."""

import os
import re
import shlex
import subprocess
import sys

import caption_folder
import pretrain
import pytest
from safetensors.torch import load_file

from common.arguments import DataArguments
from common.data.loading import load_splits

from .helpers import ROOT, save_image_folder, save_towers
from .training import CONNECTOR, arguments, save_recipe

# Slurm's programs as the script calls them. The first start of a job fails on its second machine.
SLURM = {
    "accelerate": f'shift; exec {shlex.quote(sys.executable)} -m accelerate.commands.launch "$@"',
    "scontrol": "echo 127.0.0.1; echo 127.0.0.2",
    "sleep": "",
    "srun": """
        shift; status=0
        echo >> "$STARTS"
        [ "$(wc -l < "$STARTS")" = 1 ] && exit 1
        for node in 0 1; do SLURM_NODEID=$node "$@" & jobs="$jobs $!"; done
        for job in $jobs; do wait "$job" || status=1; done
        exit $status
    """,
}


def submit(folder, script, *given):
    """Runs examples/slurm.sh as a job of two machines with one process each; returns the number of its starts."""
    (folder / "bin").mkdir()
    for name, code in SLURM.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{code}\n")
        (folder / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    paths = {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **job, **paths, "STARTS": str(folder / "starts"), "OMP_NUM_THREADS": "1"}
    command = ["bash", "examples/slurm.sh", f"examples/{script}.py", *given]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return len((folder / "starts").read_text().splitlines())


def test_two_machines_train_as_one_with_twice_the_batch_and_go_on_after_a_failure(tmp_path):
    data = {"connector_config": CONNECTOR, "dataset": save_image_folder(tmp_path / "images"), "cache_features": False}
    recipe = save_recipe(tmp_path, **save_towers(tmp_path), **data, max_steps=2, max_new_tokens=4)
    pretrain.main(arguments(recipe, tmp_path / "one", per_device_train_batch_size=4))
    two = arguments(recipe, tmp_path / "two", per_device_train_batch_size=2, resume_from_checkpoint=True)
    assert submit(tmp_path, "pretrain", *two) == 2
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in expected.items():
        assert weight.allclose(found[name], atol=1e-4, rtol=1e-3), name


def test_the_documented_jobs_run_scripts_with_arguments_that_they_know():
    text = (ROOT / "docs" / "many_machines.md").read_text(encoding="utf-8")
    jobs = [
        shlex.split(block.replace("\\\n", "")) for block in re.findall(r"```bash\n(sbatch .*?)```", text, re.DOTALL)
    ]
    assert len(jobs) == 2
    for job in jobs:
        script, *given = job[job.index("examples/slurm.sh") + 1 :]
        parsed = {"examples/pretrain.py": pretrain.ARGUMENTS, "examples/caption_folder.py": CAPTION}[script]
        pretrain.parse_arguments(*parsed, argv=given)


CAPTION = (caption_folder.FolderArguments, caption_folder.GenerationArguments)


def test_a_package_that_s3_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        ValueError, match="`dataset`: 'parquet' cannot be read: ImportError: Install s3fs to access S3"
    ):
        load_splits(DataArguments(dataset="parquet", data_files={"train": "s3://bucket/a.parquet"}))
