"""Arguments of the scripts: which data to read, and how."""

from dataclasses import dataclass, field
from typing import Any

from processing_evlgen.images import MAX_PIXELS


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
            "help": "Several data sets to train on: a list of {dataset, weight, data_files, caption_column, ...}; "
            "JSON or a YAML file on the command line. `dataset` then gives the held-out rows only."
        },
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str | None = field(default="test", metadata={"help": "Held-out split; empty for none."})
    image_column: str = field(default="image", metadata={"help": "Column of images, paths or URLs."})
    video_column: str | None = field(default=None, metadata={"help": "Column of videos; default: images are read."})
    num_frames: int = field(default=4, metadata={"help": "Frames taken from each video."})
    caption_column: str = field(default="caption", metadata={"help": "Column of captions; from a list, one is drawn."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first samples."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Use only the first held-out samples."})
    streaming: bool = field(default=False, metadata={"help": "Read while training; needs max_steps."})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "Rows of a stream that each reader holds and shuffles."}
    )
    prompt: str = field(default="", metadata={"help": "Prompt that stands with each image."})
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column of questions; they replace {} in the prompt, e.g. 'Question: {} Short answer:'."},
    )
    messages_column: str | None = field(
        default=None,
        metadata={"help": "Column of conversations in the `messages` format; default: captions and prompts are read."},
    )
    crop_scale: list[float] | None = field(
        default=None, metadata={"help": "Train on random crops with this share of the image's area, e.g. 0.5 1.0."}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    cache_features: bool = field(
        default=False,
        metadata={"help": "Run the frozen vision tower over the data once; keep its features on disk."},
    )
    cached_views: int | None = field(
        default=None, metadata={"help": "Crops and flips of each training image to keep in the cache."}
    )
    max_pixels: int = field(
        default=MAX_PIXELS, metadata={"help": "Largest width times height of an image or frame; larger ones are bad."}
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={
            "help": "Skip rows with an unreadable image or no caption, and list them; default: stop at the first one."
        },
    )

    @property
    def used_columns(self) -> tuple[str, ...]:
        """Names of the arguments that name a column to read; that of the images or videos first."""
        text = ("messages_column",) if self.messages_column else ("caption_column",)
        prompt = ("prompt_column",) if self.prompt_column else ()
        return ("video_column" if self.video_column else "image_column", *text, *prompt)
