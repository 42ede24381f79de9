"""Captions Parquet files on the machines of a Ray cluster: each worker takes one file at a time.

    python examples/caption_with_ray.py --model outputs/demo --input_dir my_parquet --output_dir outputs/ray \
        --num_workers 2

The Parquet files in `--input_dir` have images in `--column`. For each, `--output_dir` gets a file of the same name,
with its other columns, the `caption`, and an `error` if the image could not be read. The captions are those of
`caption_folder.py` in one process. A file appears when all its captions are written. So a run that was interrupted
goes on with the files that are missing: start it again.

Without a cluster (`ray start`), the workers are processes of this machine. All machines need this repository with
`.[ray]`, and see the same paths. `s3://` paths need the package s3fs, `gs://` needs gcsfs.
"""

import common.processes  # isort: skip  # first, since it sets how PyTorch's threads wait

import os
from collections import Counter
from dataclasses import dataclass
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
    input_dir: str = HfArg(default="shards", help="Folder of Parquet files.")
    output_dir: str = HfArg(default="outputs/captions", help="Folder of the captions.")
    column: str = HfArg(default="image", help="Column of images.")
    prompt: str = HfArg(default="", help="Prompt that stands with each image.")
    batch_size: int = HfArg(default=16, help="Images that a worker captions together.")
    max_new_tokens: int = HfArg(default=30, help="Longest caption, in tokens.")
    num_workers: int = HfArg(default=1, help="Workers on all machines.")
    gpus_per_worker: float = HfArg(default=0.0, help="GPUs of each; with 0.5, one reads while the other computes.")

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens", "num_workers"):
            check_count(name, getattr(self, name), 1)


class Captioner:
    """A worker. It loads the model once."""

    def __init__(self, column: str, batch_size: int, model: str, **settings: Any):
        self.column, self.batch_size = column, batch_size
        self.captioner = pipeline("image-to-text", model, trust_remote_code=True, batch_size=batch_size, **settings)

    def __call__(self, part: dict[str, str]) -> dict[str, Any]:
        """Captions the file `source` into the file `target`, and counts its images."""
        partial = part["target"] + ".tmp"
        with fsspec.open(part["source"], "rb") as source, fsspec.open(partial, "wb") as target:
            file = pq.ParquetFile(source)
            captioned = [self.caption(batch) for batch in file.iter_batches(self.batch_size)]  # without their images
            schema = self.caption(pa.RecordBatch.from_pylist([], file.schema_arrow)).schema
            table = pa.Table.from_batches(captioned, schema)
            pq.write_table(table, target)
        fsspec.url_to_fs(partial)[0].mv(partial, part["target"])
        return {**part, "captioned": table["error"].null_count, "broken": table["caption"].null_count}

    def caption(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        texts, errors, images = [None] * len(batch), [None] * len(batch), {}
        for row, value in enumerate(batch[self.column].to_pylist()):
            try:
                images[row] = load_rgb_image({"bytes": value, "path": None} if isinstance(value, bytes) else value)
            except (OSError, ValueError) as error:
                errors[row] = str(error)
        for row, answer in zip(images, self.captioner([*images.values()]), strict=True):
            texts[row] = answer[0]["generated_text"]
        kept = batch.drop_columns(self.column).append_column("caption", pa.array(texts, pa.string()))
        return kept.append_column("error", pa.array(errors, pa.string()))


def main(argv: list[str] | None = None) -> dict[str, int]:
    (arguments,) = parse_arguments(RayArguments, argv=argv)
    inputs, folder = fsspec.url_to_fs(arguments.input_dir)
    outputs, target = fsspec.url_to_fs(arguments.output_dir)
    names = [os.path.basename(path) for path in sorted(inputs.glob(f"{folder}/*.parquet"))]
    if not names:
        raise ValueError(f"`input_dir`: there is no Parquet file in {arguments.input_dir!r}.")
    outputs.makedirs(target, exist_ok=True)
    pending = [
        {"source": inputs.unstrip_protocol(f"{folder}/{name}"), "target": outputs.unstrip_protocol(f"{target}/{name}")}
        for name in names
        if not outputs.exists(f"{target}/{name}")
    ]
    print(f"{len(pending)} of {len(names)} files are to be captioned.")
    settings = {name: getattr(arguments, name) for name in ("column", "prompt", "batch_size", "max_new_tokens")}
    settings["model"] = os.path.abspath(arguments.model) if os.path.exists(arguments.model) else arguments.model
    counts: Counter = Counter(captioned=0, broken=0)
    if pending:
        workers = ray.data.ActorPoolStrategy(size=min(arguments.num_workers, len(pending)))
        rows = ray.data.from_items(pending, override_num_blocks=len(pending))
        options = {"compute": workers, "num_gpus": arguments.gpus_per_worker}
        for row in rows.map(Captioner, fn_constructor_kwargs=settings, **options).iter_rows():
            print(f"{row['target']}: {row['captioned']} captions, {row['broken']} images could not be read.")
            counts.update({name: row[name] for name in counts})
        ray.shutdown()
    return dict(counts)


if __name__ == "__main__":
    common.processes.run_script(main)
