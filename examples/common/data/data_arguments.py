"""Arguments of the scripts that say which data to read, and how."""

from dataclasses import dataclass, field
from typing import Any


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
