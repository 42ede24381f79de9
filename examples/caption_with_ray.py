"""Captions Parquet files on the machines of a Ray cluster: each worker takes one file at a time.

    python examples/caption_with_ray.py --model outputs/demo --inputs my_parquet --output_dir outputs/ray \
        --num_workers 2

`--inputs` are Parquet files, and folders of them, with images in `--column`. For each, `--output_dir` gets a file of
the same name, with its other columns, the `text`, and an `error` if the image could not be read. The captions are
those of `caption_folder.py` in one process. A file appears when all its captions are written. So a run that was
interrupted goes on with the files that are missing: start it again.

Without a cluster (`ray start`), the workers are processes of this machine. All machines need this repository with
`.[ray]`, and see the same paths. `s3://` paths need the package s3fs, `gs://` needs gcsfs.
"""

import os
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import: no telemetry
import fsspec
import pyarrow as pa
import ray
from pyarrow import parquet as pq
from transformers import pipeline
from transformers.hf_argparser import HfArg

from common.arguments import check_count, parse_arguments
from processing_evlgen.images import load_rgb_image


@dataclass
class RayArguments:
    model: str = HfArg(default="outputs/demo", help="Captioner: a folder that all machines see, or a name on the Hub.")
    inputs: list[str] = HfArg(default_factory=list, help="Parquet files, or folders of them; `s3://` too.")
    output_dir: str = HfArg(default="outputs/captions", help="Folder of the captions.")
    column: str = HfArg(default="image", help="Column of images.")
    prompt: str = HfArg(default="", help="Prompt that stands with each image.")
    batch_size: int = HfArg(default=16, help="Images that a worker captions together.")
    num_beams: int = HfArg(default=1, help="Beams of the search.")
    max_new_tokens: int = HfArg(default=30, help="Longest caption, in tokens.")
    num_workers: int = HfArg(default=1, help="Workers on all machines.")
    gpus_per_worker: float = HfArg(default=0.0, help="GPUs of each; with 0.5, one reads while the other computes.")

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_beams", "max_new_tokens", "num_workers"):
            check_count(name, getattr(self, name), 1)


class Captioner:
    """A worker. It loads the model once."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.captioner = pipeline("image-to-text", model=settings["model"], trust_remote_code=True)

    def __call__(self, part: dict[str, str]) -> dict[str, Any]:
        """Captions the file `source` into the file `target`, and returns their numbers of images."""
        counts, partial = Counter(captioned=0, broken=0), part["target"] + ".tmp"
        files, _ = fsspec.url_to_fs(partial)
        with fsspec.open(part["source"], "rb") as source, fsspec.open(partial, "wb") as target:
            file, writer = pq.ParquetFile(source), None
            for batch in file.iter_batches(self.settings["batch_size"]):
                captioned = self.caption(batch, counts)
                writer = writer or pq.ParquetWriter(target, captioned.schema)
                writer.write_batch(captioned)
            if writer is not None:
                writer.close()
        files.mv(partial, part["target"])
        return {**part, **counts}

    def caption(self, batch: pa.RecordBatch, counts: Counter) -> pa.RecordBatch:
        column, settings = self.settings["column"], self.settings
        texts, errors, images = [None] * len(batch), [None] * len(batch), {}
        for row, value in enumerate(batch[column].to_pylist()):
            try:
                images[row] = load_rgb_image({"bytes": value, "path": None} if isinstance(value, bytes) else value)
            except (OSError, ValueError) as error:
                errors[row] = str(error)
        names = ("prompt", "batch_size", "num_beams", "max_new_tokens")
        answers = self.captioner([*images.values()], **{name: settings[name] for name in names})
        for row, answer in zip(images, answers, strict=True):
            texts[row] = answer[0]["generated_text"]
        counts.update(captioned=len(images), broken=len(batch) - len(images))
        kept = batch.drop_columns(column)
        return kept.append_column("text", pa.array(texts, pa.string())).append_column(
            "error", pa.array(errors, pa.string())
        )


def find_parts(inputs: list[str], output_dir: str) -> list[dict[str, str]]:
    """The files to caption, each with the file to write. A ValueError names what is missing or given twice."""
    parts: dict[str, dict[str, str]] = {}
    for name in inputs:
        files, path = fsspec.url_to_fs(name)
        found = sorted(files.glob(f"{path}/**/*.parquet")) if files.isdir(path) else [path] * files.exists(path)
        if not found:
            raise ValueError(f"`inputs`: there is no Parquet file {name}, nor one in a folder of that name.")
        for source in found:
            target = f"{output_dir.rstrip('/')}/{os.path.basename(source)}"
            if target in parts:
                raise ValueError(f"`inputs`: {source} and {parts[target]['source']} have one name.")
            parts[target] = {"source": files.unstrip_protocol(source), "target": target}
    return list(parts.values())


def main(argv: list[str] | None = None) -> dict[str, int]:
    (arguments,) = parse_arguments(RayArguments, argv=argv)
    output, folder = fsspec.url_to_fs(arguments.output_dir)
    output.makedirs(folder, exist_ok=True)
    parts = find_parts(arguments.inputs, output.unstrip_protocol(folder))
    if not parts:
        raise ValueError("`inputs` is needed: Parquet files, or folders of them.")
    pending = [part for part in parts if not output.exists(part["target"])]
    print(f"{len(pending)} of {len(parts)} files are to be captioned.")
    counts: Counter = Counter(captioned=0, broken=0)
    model = os.path.abspath(arguments.model) if os.path.exists(arguments.model) else arguments.model
    if pending:
        workers = ray.data.ActorPoolStrategy(size=min(arguments.num_workers, len(pending)))
        rows = ray.data.from_items(pending, override_num_blocks=len(pending))
        given = ({**asdict(arguments), "model": model},)
        rows = rows.map(Captioner, fn_constructor_args=given, compute=workers, num_gpus=arguments.gpus_per_worker)
        for row in rows.iter_rows():
            print(f"{row['target']}: {row['captioned']} captions, {row['broken']} images could not be read.")
            counts.update({name: row[name] for name in counts})
        ray.shutdown()
    return dict(counts)


if __name__ == "__main__":
    main()
