"""Arguments of the scripts that generate text: decoding, the model, and what is evaluated."""

from dataclasses import dataclass, field
from typing import Any

from common.data.data_arguments import DataArguments


@dataclass
class GenerationArguments:
    num_beams: int = field(default=1, metadata={"help": "Beams when held-out captions are generated."})
    min_new_tokens: int | None = field(default=None, metadata={"help": "Least length of a generated caption."})
    max_new_tokens: int = field(default=30, metadata={"help": "Largest length of a generated caption."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "Power of its length that a beam's score is divided by; 0 is the sum alone."}
    )


@dataclass
class AnswerArguments:
    model: str = field(default="outputs/demo", metadata={"help": "Captioner: a folder or a name on the Hub."})
    batch_size: int = field(default=16, metadata={"help": "Rows in a batch of each process."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images ahead."})
    dtype: str = field(
        default="float32",
        metadata={"help": "float32, or bfloat16, which is faster, but lets an answer depend on its batch."},
    )


@dataclass
class EvaluationArguments(AnswerArguments):
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where answers and results go; default: outputs/evaluation/<model>/<benchmark or dataset>."},
    )
    benchmark: str | None = field(
        default=None,
        metadata={"help": "A published benchmark, read from its own files; the script's head tells which there are."},
    )
    annotations: str | None = field(default=None, metadata={"help": "The benchmark's annotation file, as published."})
    media_dir: str | None = field(default=None, metadata={"help": "Folder of the benchmark's images or videos."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "In place of a benchmark: openmoji-scenes, easy-vqa, or what `datasets.load_dataset` takes: a "
            "folder, a name on the Hub, or parquet, json, csv … together with data_files."
        },
    )
    data_files: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Files or patterns of each split; JSON on the command line."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    test_split: str = field(default="test", metadata={"help": "Split, of a benchmark with splits or of the dataset."})
    image_column: str = field(default="image", metadata={"help": "The dataset's column of images, paths or URLs."})
    max_samples: int | None = field(default=None, metadata={"help": "Only the first rows, for a quick look."})

    def data_arguments(self, dataset: str, **columns: Any) -> DataArguments:
        """By which training's functions read the split of a data set."""
        return DataArguments(
            dataset=dataset,
            data_files=self.data_files,
            dataset_config=self.dataset_config,
            test_split=self.test_split,
            image_column=self.image_column,
            **columns,
        )
