"""Helpers of the streams' tests: tar shards of images, arguments that name them, and streams."""

import io
import json
import os
import tarfile
from dataclasses import replace

from PIL import Image

from common.data.data_arguments import DataArguments
from common.data.loading import load_datasets
from common.data.streams import CaptionStream, Source

from .helpers import COLORS

SIZES = (6, 3, 7, 2, 5, 4)  # rows of the shards
ALL = [f"image {index}" for index in range(sum(SIZES))]
SIZES_OF_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def png(color):
    image = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(image, format="PNG")
    return image.getvalue()


def write_tars(folder, sizes, first=0, broken=()):
    """Writes WebDataset shards of images with captions "image 0", "image 1", …; `broken` are numbers of bad images."""
    folder.mkdir(parents=True, exist_ok=True)
    number = first
    for shard, size in enumerate(sizes):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for _ in range(size):
                image = b"no image" if number in broken else png(COLORS[number % len(COLORS)])
                write_sample(tar, number, png=image, txt=f"image {number}".encode())
                number += 1
    return folder


def write_sample(tar, number, **members):
    for suffix, content in members.items():
        member = tarfile.TarInfo(f"{number:04d}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def webdataset(folder, **changes):
    files = {"train": str(folder / "*.tar")}
    named = {"dataset": "webdataset", "data_files": files, "image_column": "png", "caption_column": "txt"}
    return DataArguments(**named, test_split="", streaming=True, **changes)


def captions(rows):
    return [row["txt" if "txt" in row else "caption"] for row in rows]


def stream_of(kind, seed=0, buffer_size=4):
    if isinstance(kind, DataArguments):
        return load_datasets(replace(kind, shuffle_buffer=buffer_size), seed)[0]
    return CaptionStream([Source("rows", kind)], seed, buffer_size)


def options(towers, tars, output, **changes):
    given = {
        **towers,
        "connector_config": json.dumps({**SIZES_OF_LAYERS, "merge_r": 3}),  # with dropout
        "dataset": "webdataset",
        "data_files": json.dumps({"train": str(tars / "*.tar")}),
        "image_column": "png",
        "caption_column": "txt",
        "streaming": True,
        "test_split": "",
        "skip_bad_rows": True,
        "shuffle_buffer": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "output_dir": output,
        **changes,
    }
    return ["--config", os.devnull, *(text for name, value in given.items() for text in (f"--{name}", str(value)))]
