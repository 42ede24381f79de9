"""What the scripts can be told, on the command line or in a YAML file."""

import json
from argparse import ArgumentParser
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


@dataclass
class ModelArguments:
    vision_model: str | None = field(default=None, metadata={"help": "Vision tower: a folder or a name on the Hub."})
    text_model: str | None = field(default=None, metadata={"help": "Language model: a folder or a name on the Hub."})
    connector: Literal["tomeformer", "qformer", "mlp"] = field(
        default="tomeformer", metadata={"help": "Kind of connector; the other two are there to be compared with."}
    )
    connector_model: str | None = field(
        default=None,
        metadata={"help": "BERT checkpoint to start a TomeFormer or a Q-Former from, e.g. bert-base-uncased."},
    )
    connector_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "All fields of the connector's configuration, in place of a recipe's; as JSON on the command line."
        },
    )
    whitening_images: int = field(
        default=0,
        metadata={
            "help": "Let the vision projection start from the statistics of the tower's features, measured on so many "
            "training images. Default: 0, a random start as in the paper."
        },
    )
    vision_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the vision tower."})
    text_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the language model."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the frozen towers. Default: the language model's."})
    towers: Literal["include", "reference"] | None = field(
        default=None,
        metadata={
            "help": "Whether checkpoints hold the frozen towers or only name them. Default: name those from the Hub."
        },
    )

    def __post_init__(self):
        number = self.whitening_images
        if type(number) is not int or number < 0:
            raise ValueError(f"`whitening_images` must be a whole number, 0 or more, but is {number!r}.")


@dataclass
class ProcessorArguments:
    end_of_text: str | None = field(default=None, metadata={"help": "What ends a caption. Default: the EOS token."})
    bos_label: bool = field(default=False, metadata={"help": "Train the BOS token behind the image, as with OPT."})
    clean_captions: bool = field(default=False, metadata={"help": "Clean captions up as the paper does."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja chat template in place of the model's; empty for none."}
    )


@dataclass
class DataArguments:
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "openmoji-scenes, easy-vqa, or what `datasets.load_dataset` takes: a folder with metadata, a name "
            "on the Hub, or imagefolder, parquet, json, csv or webdataset together with data_files."
        },
    )
    data_files: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Files or patterns of each split; JSON on the command line."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    mixture: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": "Several data sets to train on, in place of `dataset`, which then gives held-out rows alone: a "
            "list of {dataset, weight, data_files, caption_column, ...}; JSON or a YAML file on the command line."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str | None = field(default="test", metadata={"help": "Held-out split; leave empty for none."})
    image_column: str = field(default="image", metadata={"help": "Column of images, paths or URLs."})
    video_column: str | None = field(default=None, metadata={"help": "Column of videos, in place of images."})
    num_frames: int = field(default=4, metadata={"help": "Frames taken of each video."})
    caption_column: str = field(default="caption", metadata={"help": "Column of captions; of a list, one is drawn."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first samples."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Use only the first held-out samples."})
    streaming: bool = field(default=False, metadata={"help": "Read while training; needs max_steps."})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Rows of a stream that each of its readers holds and shuffles at a time."}
    )
    prompt: str = field(default="", metadata={"help": "What the model is told along with each image."})
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of questions; {} in the prompt is where they go, e.g. 'Question: {} Short answer:'."
        },
    )
    messages_column: str | None = field(
        default=None,
        metadata={"help": "Column of conversations in the `messages` format, in place of captions and prompts."},
    )
    crop_scale: list[float] | None = field(
        default=None, metadata={"help": "Train on random crops of this share of the image, e.g. 0.5 1.0."}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    cache_features: bool = field(
        default=False, metadata={"help": "Run the frozen vision tower once over the data and keep what it gives."}
    )
    cached_views: int | None = field(
        default=None, metadata={"help": "How many crops and flips of each training image to keep, with them set."}
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={
            "help": "Name and count rows with an unreadable image or no caption and go on, instead of stopping."
        },
    )

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Those of these arguments that name a column that is read."""
        text = ("messages_column",) if self.messages_column else ("caption_column",)
        prompt = ("prompt_column",) if self.prompt_column else ()
        return ("video_column" if self.video_column else "image_column", *text, *prompt)


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


@dataclass
class TrainingSettings(TrainingArguments):
    """transformers' TrainingArguments with the defaults of these scripts."""

    output_dir: str = "outputs/pretrain"
    remove_unused_columns: bool = False  # the collator needs the images and captions themselves
    # The main process would have to join batches of different lengths to hand them out.
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})
    ddp_timeout: int = 86400  # seconds; other processes wait while one prepares models and data
    logging_first_step: bool = True
    prediction_loss_only: bool = True  # or the Trainer would keep the logits of the whole held-out split

    ddp_find_unused_parameters: bool | None = False  # all trained parameters are used

    def __post_init__(self):
        # bf16 works on a CPU as well, but the Trainer wants to be told that a CPU it is.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        # Or `from_pretrained` would share each tower out at once under ZeRO-3, together with processes that wait for
        # their turn, and towers in parts cannot be hashed. DeepSpeed shares the whole model out before training.
        unset_hf_deepspeed_config()


def parse_arguments(*dataclass_types: type, argv: list[str] | None, recipe: Path | None = None) -> tuple[Any, ...]:
    """Reads the YAML file given by `--config`, or `recipe`, and the command line, which overrides it.

    Args:
        dataclass_types: What to fill.
        argv: The command line without the program's name; None for the process's.
        recipe: The YAML file to read if the command line names none, if any.

    Returns:
        One instance of each dataclass.

    Raises:
        ValueError: If the YAML file holds a name that no dataclass has.
    """
    config = ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path, default=recipe, help="YAML file with any of these arguments.")
    path, argv = config.parse_known_args(argv)
    parser = HfArgumentParser(dataclass_types, parents=[config], allow_abbrev=False)
    settings = {}
    if path.config is not None:
        settings = yaml.safe_load(path.config.read_text(encoding="utf-8")) or {}
    known = {field.name for dataclass_type in dataclass_types for field in fields(dataclass_type)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(f"{path.config} holds unknown arguments: {', '.join(unknown)}.")
    parser.set_defaults(**settings)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    parsed = tuple(parsed[: len(dataclass_types)])
    for option in unknown:
        close = get_close_matches(option.lstrip("-"), known, n=1)
        hint = f" Did you mean --{close[0]}?" if close else ""
        raise ValueError(f"Unknown argument {option}.{hint}")
    for arguments in parsed:
        for name, value in vars(arguments).items():  # JSON from the command line
            holds_json = isinstance(value, str) and value.startswith(("{", "["))
            if name in ("connector_config", "data_files", "mixture") and holds_json:
                setattr(arguments, name, json.loads(value))
    return parsed
