"""Arguments of the scripts that generate text: the decoding, the model, and the data to evaluate on."""

from dataclasses import dataclass, field
from typing import Any

from common.data.data_arguments import DataArguments


def check_count(name: str, value: Any, least: int) -> None:
    """
    Raises:
        ValueError: If an argument is no integer of `least` or more. A YAML file may hold anything.
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer of {least} or more, but is {value!r}.")


@dataclass
class GenerationArguments:
    num_beams: int = field(default=1, metadata={"help": "Beams when held-out captions are generated; 1 is greedy."})
    min_new_tokens: int | None = field(default=None, metadata={"help": "Smallest length of a generated caption."})
    max_new_tokens: int = field(default=30, metadata={"help": "Largest length of a generated caption."})
    length_penalty: float = field(
        default=1.0, metadata={"help": "A beam's score is divided by its length to this power; 0 leaves the sum."}
    )

    def __post_init__(self) -> None:
        check_count("num_beams", self.num_beams, 1)
        if self.min_new_tokens is not None:
            check_count("min_new_tokens", self.min_new_tokens, 0)
        if self.max_new_tokens is not None:  # the evaluation scripts choose it by the benchmark
            check_count("max_new_tokens", self.max_new_tokens, max(1, self.min_new_tokens or 0))


@dataclass
class AnswerArguments:
    model: str = field(default="outputs/demo", metadata={"help": "Captioner: a folder or a name on the Hub."})
    batch_size: int = field(default=16, metadata={"help": "Rows in a batch of each process."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images ahead."})
    dtype: str = field(
        default="float32",
        metadata={"help": "float32; or bfloat16, which is faster, but an answer then depends on its batch."},
    )

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, 1)
        check_count("num_workers", self.num_workers, 0)


@dataclass
class EvaluationArguments(AnswerArguments):
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of answers and results; default: outputs/evaluation/<model>/<benchmark or dataset>."
        },
    )
    benchmark: str | None = field(
        default=None,
        metadata={"help": "A published benchmark, read from its own files; the table in the script lists them."},
    )
    annotations: str | None = field(default=None, metadata={"help": "The benchmark's annotation file, as published."})
    media_dir: str | None = field(default=None, metadata={"help": "Folder of the benchmark's images or videos."})
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "Instead of a benchmark: openmoji-scenes, easy-vqa, or what `datasets.load_dataset` takes: a "
            "folder, a name on the Hub, or parquet, json, csv … together with data_files."
        },
    )
    data_files: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Files or patterns of each split; JSON on the command line."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    test_split: str = field(default="test", metadata={"help": "Split of the dataset, or of a benchmark with splits."})
    image_column: str = field(default="image", metadata={"help": "The dataset's column of images, paths or URLs."})
    max_samples: int | None = field(default=None, metadata={"help": "Only the first rows, for a quick look."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_samples is not None:
            check_count("max_samples", self.max_samples, 1)

    def data_arguments(self, dataset: str, **columns: Any) -> DataArguments:
        """Arguments with which the functions of training read the split of a data set."""
        return DataArguments(
            dataset=dataset,
            data_files=self.data_files,
            dataset_config=self.dataset_config,
            test_split=self.test_split,
            image_column=self.image_column,
            **columns,
        )
