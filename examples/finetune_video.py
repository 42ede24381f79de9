"""Turns an image captioner into a video captioner and trains it on videos with captions.

    python examples/finetune_video.py

trains the demo's captioner on animated emoji, which npm fetches. Your own videos, with the paper's recipe:

    accelerate launch examples/finetune_video.py --config examples/configs/video-opt-2.7b.yaml \
        --image_model path/to/image/model --dataset path/to/folder

The folder holds videos and a `metadata.jsonl` with their `file_name` and `caption`.
"""

# First: it sets how PyTorch's threads wait, before PyTorch is loaded.
from common.processes import use_all_cores  # isort: skip

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import set_seed
from transformers.hf_argparser import HfArg

from common.command_line import parse_arguments
from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.demo.emoji_videos import EMOJI_VIDEOS, load_emoji_videos
from common.evaluation.evaluation_arguments import GenerationArguments
from common.models import load_trainable
from common.training.report import report
from common.training.resume import find_checkpoint
from common.training.trainer import EVLGenTrainer
from common.training.training_arguments import EVLGenTrainingArguments
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo-video.yaml"


@dataclass
class VideoArguments:
    image_model: str = HfArg(default="outputs/demo", help="Image captioner: a folder or a name on the Hub.")
    temporal_contextualizer: bool = HfArg(
        default=True, help="Let frames attend to each other inside a transformer tower. False: see video_mode."
    )
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
    use_all_cores(training_args.device)
    set_seed(training_args.seed)
    checkpoint = find_checkpoint(training_args)

    with training_args.main_process_first(desc="preparing model and data"):
        if data_args.dataset == EMOJI_VIDEOS:
            data_args.dataset = str(load_emoji_videos())
        processor = load_trainable(model_args.image_model, "image_model", EVLGenProcessor.from_pretrained)
        data_args.complete_frames(processor)
        splits = load_datasets(data_args, training_args.seed)
        load, fields = EVLGenForConditionalGeneration.from_pretrained, {}
        if model_args.temporal_contextualizer:
            load = EVLGenForConditionalGeneration.from_image_model
        if model_args.temporal_frame_positions:
            fields["temporal_frame_positions"] = True
        if model_args.video_mode is not None:
            fields["video_mode"] = model_args.video_mode
        model = load_trainable(model_args.image_model, "image_model", load, **fields)
        model.to(training_args.device)
        train_dataset, eval_dataset = cache_features(model, processor, *splits, data_args, training_args.seed)

    trainer = EVLGenTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=CaptionCollator(processor, data_args, training=True, seed=training_args.seed),
        processing_class=processor,
        script_args=(model_args, data_args),
    )
    if trainer.is_world_process_zero():
        print(model.describe_parameters())
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    return report(trainer, data_args, generation_args)


if __name__ == "__main__":
    main()
