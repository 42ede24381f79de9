"""Arguments of the scripts that generate text: the decoding, the model, and the data to evaluate on."""

from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg

from common.command_line import check_count
from processing_evlgen.images import check_max_tiles


@dataclass
class GenerationArguments:
    num_beams: int = HfArg(default=1, help="Beams when held-out captions are generated; 1 is greedy.")
    min_new_tokens: int | None = HfArg(default=None, help="Smallest length of a generated caption.")
    max_new_tokens: int = HfArg(default=30, help="Largest length of a generated caption.")
    length_penalty: float = HfArg(default=1.0, help="Exponent of the length that divides a beam's score; 0: the sum.")

    def __post_init__(self) -> None:
        check_count("num_beams", self.num_beams, 1)
        if self.min_new_tokens is not None:
            check_count("min_new_tokens", self.min_new_tokens, 0)
        if self.max_new_tokens is not None:  # the evaluation scripts choose it by the benchmark
            check_count("max_new_tokens", self.max_new_tokens, max(1, self.min_new_tokens or 0))


@dataclass
class CaptionerArguments:
    model: str = HfArg(default="outputs/demo", help="Captioner: a folder or a name on the Hub.")
    batch_size: int = HfArg(default=16, help="Images or videos in a batch of each process.")
    max_tiles: int | None = HfArg(default=None, help="Largest number of tiles of an image. Default: the model's.")
    num_image_tokens: int | None = HfArg(
        default=None, help="Tokens of each image or video, if the model was trained with several numbers."
    )

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, 1)
        if self.max_tiles is not None:
            check_max_tiles(self.max_tiles)
        if self.num_image_tokens is not None:
            check_count("num_image_tokens", self.num_image_tokens, 1)

    @property
    def layout(self) -> dict[str, int]:
        """What is given of `max_tiles` and `num_image_tokens`, as settings of the processor."""
        given = {"max_tiles": self.max_tiles, "num_image_tokens": self.num_image_tokens}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class AnswerArguments(CaptionerArguments):
    num_workers: int = HfArg(default=0, help="Processes that read images ahead.")
    dtype: str = HfArg(default="float32", help="float32; or bfloat16: faster, but answers depend on their batch.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_workers", self.num_workers, 0)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"`dtype` must be float32 or bfloat16, but is {self.dtype!r}.")


@dataclass
class EvaluationArguments(AnswerArguments):
    output_dir: str | None = HfArg(
        default=None, help="Folder of answers and results; default: outputs/evaluation/<model>/<benchmark or dataset>."
    )
    benchmark: str | None = HfArg(default=None, help="A published benchmark; the table in the script lists them.")
    annotations: str | None = HfArg(default=None, help="The benchmark's annotation file, as published.")
    media_dir: str | None = HfArg(default=None, help="Folder of the benchmark's images or videos.")
    dataset: str | None = HfArg(
        default=None,
        help="Instead of a benchmark: openmoji-scenes, easy-vqa, or what `datasets.load_dataset` takes: a "
        "folder, a name on the Hub, or parquet, json, csv … together with data_files.",
    )
    data_files: dict[str, Any] | str | None = HfArg(default=None, help="Files or patterns of each split, as JSON.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of a data set on the Hub.")
    test_split: str = HfArg(default="test", help="Split of the dataset, or of a benchmark with splits.")
    image_column: str = HfArg(default="image", help="The dataset's column of images, paths or URLs.")
    max_samples: int | None = HfArg(default=None, help="Only the first rows, for a quick look.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_samples is not None:
            check_count("max_samples", self.max_samples, 1)
