"""Helpers of the training scripts' tests: command lines, processes, weights, saved models and videos, tar shards."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from PIL import Image
from safetensors.torch import load_file

from common.arguments import DataArguments
from common.data.loading import load_datasets
from common.data.streams import CaptionStream, Source

from .helpers import COLORS, LAYERS, ROOT, TWO_PROCESSES, save, save_split, tiny_processor

CONNECTOR = {**LAYERS, "merge_r": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHARDS = (6, 3, 7, 2, 5, 4)  # rows of each
CAPTIONS = [f"image {index}" for index in range(sum(SHARDS))]


def flags(**values):
    """A command line of these arguments: a list becomes several words, a dictionary JSON."""
    words = []
    for name, value in values.items():
        value = json.dumps(value) if isinstance(value, dict) else value
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def save_recipe(folder, **recipe):
    (folder / "recipe.yaml").write_text(json.dumps({"disable_tqdm": True, **recipe}, default=str))  # JSON is YAML
    return folder


def arguments(work, output, **changes):
    """The command line of a run by the recipe in a folder."""
    return flags(config=work / "recipe.yaml", output_dir=output, **changes)


def save_captioner(folder, model, chat=False, **settings):
    """Saves a model with a processor. `settings` are attributes of the processor; returns the folder."""
    processor = tiny_processor(model, chat=chat)
    for name, value in settings.items():
        setattr(processor, name, value)
    save(folder, model, processor)
    return folder


def save_videos(folder, **lengths):
    """Saves videos of some numbers of frames for each split, with captions; returns the folder."""
    from .test_video import write_video

    for split, counts in lengths.items():
        rows = [{"caption": f"a video of {count}"} for count in counts]
        save_split(folder / split, counts, rows, "mp4", lambda count, path: write_video(path, count))
    return folder


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(one, other, atol=0.0, rtol=0.0):
    torch.testing.assert_close(weights(other), weights(one), atol=atol, rtol=rtol)


def logged(checkpoint, name="loss"):
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(script, arguments, two=False, **kwargs):
    launcher = ["-m", "accelerate.commands.launch", *TWO_PROCESSES]
    command = [sys.executable, *(launcher if two else []), str(script), *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(command, env=environment, **kwargs)


def kill_after(process, checkpoint):
    """Kills a run (SIGKILL) as soon as it has a checkpoint, and takes away later ones, if it was too fast."""
    deadline, state = time.time() + 240, checkpoint / "trainer_state.json"
    while not state.exists() or not state.read_text().endswith("}\n"):  # it is not written at once
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)
    launcher = psutil.Process(process.pid)
    family = [launcher, *launcher.children(recursive=True)]
    for member in family:  # the launcher's processes have sessions of their own
        member.kill()
    psutil.wait_procs(family)
    for later in set(checkpoint.parent.glob("checkpoint-*")) - {checkpoint}:
        shutil.rmtree(later)


def png(image):
    """The bytes of a file that holds an image, or one of a color."""
    image = Image.new("RGB", (40, 40), image) if isinstance(image, str) else image
    image.save(file := io.BytesIO(), format="PNG")
    return file.getvalue()


def write_tars(folder, sizes, first=0, broken=(), suffix="png"):
    """Writes WebDataset shards of images with captions "image 0", "image 1", …; `broken` are numbers of bad images."""
    folder.mkdir(parents=True, exist_ok=True)
    number = first
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for _ in range(size):
                image = b"no image" if number in broken else png(COLORS[number % len(COLORS)])
                write_sample(tar, number, **{suffix: image, "txt": f"image {number}".encode()})
                number += 1
    return folder


def write_sample(tar, number, **members):
    for suffix, content in members.items():
        name = number if isinstance(number, str) else f"{number:04d}"
        member = tarfile.TarInfo(f"{name}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def name_tars(**folders):
    """Arguments that name the tar shards in a folder for each split."""
    files = {split: str(folder / "*.tar") for split, folder in folders.items()}
    return {"dataset": "webdataset", "data_files": files, "image_column": "png", "caption_column": "txt"}


def webdataset(folder, **changes):
    return DataArguments(**name_tars(train=folder), test_split="", streaming=True, **changes)


def captions(rows):
    return [row["txt" if "txt" in row else "caption"] for row in rows]


def stream_of(kind, seed=0, buffer_size=4):
    if isinstance(kind, DataArguments):
        return load_datasets(replace(kind, shuffle_buffer=buffer_size), seed)[0]
    return CaptionStream([Source("rows", kind)], seed, buffer_size)


def stream_options(towers, output, tars=None, **changes):
    """The command line of a run on a stream of tar shards, or of what `changes` name."""
    files = name_tars(train=tars) if tars else {}
    given = {"connector_config": {**LAYERS, "merge_r": 3}, "streaming": True, "test_split": "", "skip_bad_rows": True}
    given |= {"shuffle_buffer": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1}
    given |= {"disable_tqdm": True, "output_dir": output, **files, **changes}
    return ["--config", os.devnull, *flags(**towers), *flags(**given)]
