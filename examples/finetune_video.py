"""Turns an image captioner into a video captioner and trains it on videos with captions.

    python examples/finetune_video.py

trains the demo's captioner on animated emoji, which npm fetches. Your own videos, with the paper's recipe:

    accelerate launch examples/finetune_video.py --config examples/configs/video-opt-2.7b.yaml \
        --image_model path/to/image/model --dataset path/to/folder

The folder holds videos and a `metadata.jsonl` with their `file_name` and `caption`.
"""

import common.processes  # isort: skip  # first, since it sets how PyTorch's threads wait

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from common.arguments import DataArguments, EVLGenTrainingArguments, GenerationArguments, parse_arguments
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.models import load_trainable
from common.training.run import start_run, train_captioner
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo-video.yaml"


@dataclass
class VideoArguments:
    image_model: str = HfArg(default="outputs/demo", help="Image captioner: a folder or a name on the Hub.")
    temporal_contextualizer: bool = HfArg(default=True, help="Let frames attend to each other inside the tower.")
    temporal_frame_positions: bool = HfArg(default=False, help="Let the contextualizer see the order of frames.")
    video_mode: Literal["mean", "merge"] | None = HfArg(
        default=None,
        help="mean: a video is the mean of its frames. merge: their tokens are merged, and keep their times; needs "
        "temporal_contextualizer false. Default: the image model's, which is the mean for most.",
    )


ARGUMENTS = (VideoArguments, DataArguments, GenerationArguments, EVLGenTrainingArguments)


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, data_args, generation_args, training_args = parse_arguments(*ARGUMENTS, argv=argv, recipe=DEMO_RECIPE)
    if data_args.video_column is None:
        raise ValueError("`video_column` is needed: the column of videos.")
    checkpoint = start_run(training_args)

    with training_args.main_process_first(desc="preparing model and data"):
        processor = load_trainable(model_args.image_model, "image_model", load=EVLGenProcessor.from_pretrained)
        data_args.complete_frames(processor)
        splits = load_datasets(data_args, training_args.seed)
        load = EVLGenForConditionalGeneration.from_pretrained
        if model_args.temporal_contextualizer:
            load = EVLGenForConditionalGeneration.from_image_model
        names = ("temporal_frame_positions", "video_mode")  # those that are not given stay the image model's
        fields = {name: getattr(model_args, name) for name in names if getattr(model_args, name)}
        model = load_trainable(model_args.image_model, "image_model", load=load, **fields)
        model.to(training_args.device)
        splits = cache_features(model, processor, *splits, data_args, training_args.seed)

    shared_args = training_args, generation_args, data_args
    return train_captioner(model, processor, splits, checkpoint, *shared_args, model_args)


if __name__ == "__main__":
    common.processes.run_script(main)
