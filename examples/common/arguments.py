"""Arguments of the scripts, as dataclasses, and how they are read from the command line and from a YAML file."""

import json
from argparse import ArgumentParser
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from configuration_evlgen import EVLGenConfig, read_budgets
from modeling_evlgen.fingerprints import find_adapter
from processing_evlgen import EVLGenProcessor
from processing_evlgen.images import MAX_PIXELS, check_max_tiles
from processing_evlgen.videos import FrameChoice


def parse_arguments(*dataclass_types: type, argv: list[str] | None, recipe: Path | None = None) -> tuple[Any, ...]:
    """Reads the YAML file given by `--config`, or `recipe`, and the command line, which overrides it.

    `argv` is the command line without the program's name; None for the process's. `--fps` overrides the file's
    `num_frames` as well, and the other way round: only one of them can be given. Returns one instance of each
    dataclass. Raises a ValueError if the file or the command line holds a name that no dataclass has.
    """
    config = ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path, default=recipe, help="YAML file with any of these arguments.")
    config.add_argument("--trust_remote_code", action="store_true", help="Run a connector from the model's folder.")
    path, argv = config.parse_known_args(argv)
    parser = HfArgumentParser(dataclass_types, parents=[config], allow_abbrev=False)
    settings = {}
    if path.config is not None:
        settings = yaml.safe_load(path.config.read_text(encoding="utf-8")) or {}
    known = {field.name for dataclass_type in dataclass_types for field in fields(dataclass_type)}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(f"{path.config} holds unknown arguments: {', '.join(unknown)}.")
    if any(option.partition("=")[0] in ("--num_frames", "--num-frames", "--fps") for option in argv):
        settings = {name: value for name, value in settings.items() if name not in ("num_frames", "fps")}
    parser.set_defaults(**settings)
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    parsed = tuple(parsed[: len(dataclass_types)])
    for option in unknown:
        close = get_close_matches(option.lstrip("-"), known, n=1)
        hint = f" Did you mean --{close[0]}?" if close else ""
        raise ValueError(f"Unknown argument {option}.{hint}")
    if path.trust_remote_code:
        for arguments in parsed:
            _load_own_connector(getattr(arguments, "model", None) or getattr(arguments, "image_model", None))
    for arguments in parsed:
        for name, value in vars(arguments).items():  # JSON from the command line
            holds_json = isinstance(value, str) and value.startswith(("{", "["))
            if name in ("connector_config", "data_files", "mixture") and holds_json:
                setattr(arguments, name, json.loads(value))
    return parsed


def _load_own_connector(model: str | None) -> None:
    """Loads the connector that a checkpoint brings, if any, for all that loads the checkpoint later."""
    if model is not None:
        with suppress(OSError):  # a missing model is named where it is loaded
            EVLGenConfig.get_config_dict(find_adapter(model, {})[0], trust_remote_code=True)


def check_count(name: str, value: Any, least: int, optional: bool = False) -> None:
    """Raises a ValueError if an argument is no integer of `least` or more. A YAML file may hold anything."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` must be an integer of {least} or more, but is {value!r}.")


@dataclass
class ModelArguments:
    vision_model: str | None = HfArg(default=None, help="Vision tower: a folder or a name on the Hub.")
    text_model: str | None = HfArg(default=None, help="Language model: a folder or a name on the Hub.")
    connector: str = HfArg(default="tomeformer", help="tomeformer, qformer, mlp, or one's own: my_file.py:Name.")
    connector_model: str | None = HfArg(default=None, help="BERT checkpoint to start a TomeFormer or Q-Former from.")
    connector_config: dict[str, Any] | str | None = HfArg(
        default=None, help="Fields of its configuration, in place of all of a recipe's; JSON on the command line."
    )
    whitening_images: int = HfArg(default=0, help="Images to whiten the vision projection on; 0: a random start.")
    image_size: int | None = HfArg(default=None, help="Height and width of images in pixels. Default: the tower's.")
    vision_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the vision tower.")
    text_revision: str | None = HfArg(default=None, help="Branch, tag or commit of the language model.")
    dtype: str = HfArg(default="auto", help="dtype of the frozen towers. Default: the language model's.")
    towers: Literal["include", "reference"] | None = HfArg(
        default=None, help="Whether checkpoints include the towers or name them. Default: name those from the Hub."
    )

    def __post_init__(self):
        if self.connector not in ("tomeformer", "qformer", "mlp") and ".py:" not in self.connector:
            wanted = "tomeformer, qformer, mlp, or a file and its class, as in my_file.py:Name"
            raise ValueError(f"`connector` must be {wanted}, but is {self.connector!r}.")
        check_count("whitening_images", self.whitening_images, 0)
        check_count("image_size", self.image_size, 1, optional=True)


@dataclass
class ProcessorArguments:
    end_of_text: str | None = HfArg(default=None, help="Token that ends a caption. Default: the EOS token.")
    bos_label: bool = HfArg(default=False, help="Train the BOS token after the image, as with OPT.")
    clean_captions: bool = HfArg(default=False, help="Clean captions as the paper does.")
    chat_template: str | None = HfArg(
        default=None, help="Jinja chat template; empty: none. Default: the text model's."
    )
    max_tiles: int = HfArg(default=1, help="Cut large images into up to this many tiles of the tower's input size.")
    image_token_range: list[int] | None = HfArg(
        default=None, help="Train for any number of tokens in this range: each batch draws one. Default: one number."
    )
    num_image_tokens: int | None = HfArg(
        default=None, help="Tokens of an image without a request, in that range. Default: the connector's number."
    )

    def __post_init__(self):
        check_max_tiles(self.max_tiles)
        read_budgets("num_image_tokens", [], 0, None, self.image_token_range)  # raises if it is no range
        if self.num_image_tokens is not None:
            if self.image_token_range is None:
                raise ValueError("`num_image_tokens` needs `image_token_range`; else the connector's number holds.")
            read_budgets("num_image_tokens", self.num_image_tokens, 1, None, self.image_token_range)


@dataclass
class EVLGenTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` with the defaults of these scripts."""

    output_dir: str = "outputs/pretrain"
    remove_unused_columns: bool = False  # the collator reads images and captions itself
    # Else the main process would join batches of different lengths to hand them out.
    accelerator_config: dict | str | None = field(default_factory=lambda: {"dispatch_batches": False})
    ddp_timeout: int = 86400  # seconds; other processes wait while one prepares models and data
    logging_first_step: bool = True
    prediction_loss_only: bool = True  # else the Trainer keeps the logits of the whole held-out split

    ddp_find_unused_parameters: bool | None = False  # all trained parameters are used

    def __post_init__(self):
        # bf16 works on a CPU too, but the Trainer accepts it there only with `use_cpu`.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        # Trackers show it. trackio would call a run that it is told more of, after its end, by another name.
        self.run_name = self.run_name or Path(self.output_dir).name
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            check_count(name, getattr(self, name), 1)
        # Else `from_pretrained` would partition each tower at once under ZeRO-3, together with processes that wait for
        # their turn, and a partitioned tower cannot be hashed. DeepSpeed partitions the whole model before training.
        unset_hf_deepspeed_config()

    @property
    def autocast_dtype(self) -> torch.dtype:
        """dtype of the arithmetic under `--bf16` and `--fp16`; float32 without."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32


@dataclass
class FrameArguments:
    num_frames: int | None = HfArg(
        default=None, help="Frames of each video, at equal distances, at most 512. Default: as the model was saved."
    )
    fps: float | None = HfArg(default=None, help="Frames taken for each second of a video, instead of num_frames.")

    def __post_init__(self) -> None:
        check_count("num_frames", self.num_frames, 1, optional=True)
        FrameChoice(num_frames=self.num_frames, fps=self.fps)  # raises out of range, or if both are given

    @property
    def frames(self) -> dict[str, float]:
        """Which frames of a video are read, as arguments of `load_rgb_frames`. By default 4, as a new processor's."""
        return {"num_frames": self.num_frames or 4} if self.fps is None else {"fps": self.fps}

    def complete_frames(self, processor: EVLGenProcessor) -> None:
        """Takes over the processor's choice of frames, if none is given. A given one becomes the processor's."""
        videos = processor.video_processor
        if self.num_frames is None and self.fps is None:
            self.fps = videos.fps
            self.num_frames = videos.num_frames if videos.fps is None else None
        videos.fps, videos.num_frames = self.fps, self.num_frames or videos.num_frames


@dataclass
class DatasetArguments:
    """Where rows lie, for training and evaluation."""

    dataset: str | None = HfArg(
        default=None,
        help="openmoji-scenes, crowded-scenes, easy-vqa, or what `datasets.load_dataset` takes: a folder, a name on "
        "the Hub, or imagefolder, parquet, json, csv or webdataset with data_files.",
    )
    data_files: dict[str, Any] | str | None = HfArg(default=None, help="Files or patterns of each split, as JSON.")
    dataset_config: str | None = HfArg(default=None, help="Configuration of a data set on the Hub.")
    test_split: str | None = HfArg(default="test", help="Held-out split, or that of a benchmark; empty for none.")
    test_size: float | None = HfArg(
        default=None, help="Hold out this share or number of the images of `train_split`, in place of a `test_split`."
    )
    max_test_samples: int | None = HfArg(default=None, help="Use only the first held-out samples.")
    image_column: str = HfArg(default="image", help="Column of images, paths or URLs.")
    image_root: str | None = HfArg(
        default=None, help="Folder that relative paths start from. Default: that of the file that names them."
    )

    def __post_init__(self) -> None:
        check_count("max_test_samples", self.max_test_samples, 1, optional=True)
        size = self.test_size
        is_number = isinstance(size, int | float)
        if size is not None and not (is_number and (0 < size < 1 or (size >= 1 and float(size).is_integer()))):
            raise ValueError(f"`test_size` must be a share between 0 and 1, or a number of images, but is {size!r}.")


@dataclass
class DataArguments(FrameArguments, DatasetArguments):
    mixture: list[dict[str, Any]] | str | None = HfArg(
        default=None,
        help="Several data sets to train on: a list of {dataset, weight, data_files, caption_column, ...}; "
        "JSON or a YAML file on the command line. `dataset` then gives the held-out rows only.",
    )
    train_split: str = HfArg(default="train", help="Split to train on.")
    video_column: str | None = HfArg(default=None, help="Column of videos; default: images are read.")
    caption_column: str = HfArg(default="caption", help="Column of captions, one or a list of them for each image.")
    group_by: str | None = HfArg(default=None, help="Column that rows of one image share: they become one row.")
    texts_per_image: int | None = HfArg(default=None, help="Texts of an image to draw in each epoch. Default: all.")
    max_train_samples: int | None = HfArg(default=None, help="Use only the first samples.")
    streaming: bool = HfArg(default=False, help="Read while training; needs max_steps.")
    shuffle_buffer: int = HfArg(default=1000, help="Rows of a stream that each reader holds and shuffles.")
    prompt: str = HfArg(default="", help="Prompt that stands with each image.")
    prompt_column: str | None = HfArg(
        default=None, help="Column of questions, or lists of them, which replace {} in the prompt."
    )
    messages_column: str | None = HfArg(default=None, help="Column of conversations in the `messages` format.")
    crop_scale: list[float] | None = HfArg(default=None, help="Train on crops with this share of the area: 0.5 1.0.")
    horizontal_flip: bool = HfArg(default=False, help="Mirror half of the training images.")
    cache_features: bool = HfArg(default=False, help="Run the vision tower over the data once; keep its features.")
    cached_views: int | None = HfArg(default=None, help="Crops, flips and choices of frames to cache of each image.")
    max_pixels: int = HfArg(default=MAX_PIXELS, help="Largest image or frame that is read, in pixels.")
    skip_bad_rows: bool = HfArg(default=False, help="Skip and list rows with an unreadable image or no caption.")

    def __post_init__(self) -> None:
        FrameArguments.__post_init__(self)
        DatasetArguments.__post_init__(self)
        for name in ("max_train_samples", "texts_per_image"):
            check_count(name, getattr(self, name), 1, optional=True)
        check_count("max_pixels", self.max_pixels, 1)

    @property
    def draws_views(self) -> bool:
        """Whether training draws crops, flips or frames, so that an image or a video is another one in each epoch."""
        draws_frames = self.video_column is not None and self.fps is None
        return self.crop_scale is not None or self.horizontal_flip or draws_frames

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Names of the arguments that name a column to read; that of the images or videos first."""
        text = ("messages_column",) if self.messages_column else ("caption_column",)
        prompt = ("prompt_column",) if self.prompt_column else ()
        return ("video_column" if self.video_column else "image_column", *text, *prompt)


@dataclass
class GenerationArguments:
    num_beams: int = HfArg(default=1, help="Beams when held-out captions are generated; 1 is greedy.")
    min_new_tokens: int | None = HfArg(default=None, help="Smallest length of a generated caption.")
    max_new_tokens: int = HfArg(default=30, help="Largest length of a generated caption.")
    length_penalty: float = HfArg(default=1.0, help="Exponent of the length that divides a beam's score; 0: the sum.")

    def __post_init__(self) -> None:
        check_count("num_beams", self.num_beams, 1)
        check_count("min_new_tokens", self.min_new_tokens, 0, optional=True)
        least = max(1, self.min_new_tokens or 0)
        check_count("max_new_tokens", self.max_new_tokens, least, optional=True)  # evaluations choose it by benchmark


@dataclass
class CaptionerArguments:
    model: str = HfArg(default="outputs/demo", help="Captioner: a folder or a name on the Hub.")
    batch_size: int = HfArg(default=16, help="Images or videos in a batch of each process.")
    max_tiles: int | None = HfArg(default=None, help="Largest number of tiles of an image. Default: the model's.")
    num_image_tokens: int | None = HfArg(default=None, help="Tokens of each image or video. Default: the model's.")

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, 1)
        if self.max_tiles is not None:
            check_max_tiles(self.max_tiles)
        check_count("num_image_tokens", self.num_image_tokens, 1, optional=True)

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
class EvaluationArguments(AnswerArguments, DatasetArguments):
    output_dir: str | None = HfArg(default=None, help="Folder of the results. Default: one in outputs/evaluation.")
    benchmark: str | None = HfArg(default=None, help="A published benchmark; docs/evaluate.md lists them.")
    annotations: str | None = HfArg(default=None, help="The benchmark's annotation file, as published.")
    media_dir: str | None = HfArg(default=None, help="Folder of the benchmark's images or videos.")

    def __post_init__(self) -> None:
        AnswerArguments.__post_init__(self)
        DatasetArguments.__post_init__(self)
