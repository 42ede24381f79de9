"""Turns an image captioner into a video captioner and fine-tunes it on videos with captions.

    python examples/finetune_video.py

goes on with the image demo's model, on animated emoji that npm brings. Your own videos, from a video model's recipe:

    accelerate launch examples/finetune_video.py --config examples/configs/video-opt-2.7b.yaml \
        --image_model path/to/image/model --dataset path/to/folder

where the folder holds videos and a `metadata.jsonl` with their `file_name` and `caption`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from common.command_line import parse_arguments
from common.data.data_arguments import DataArguments
from common.data.loading import load_captions
from common.demo.emoji_videos import EMOJI_VIDEOS, load_emoji_videos
from common.evaluation.evaluation_arguments import GenerationArguments
from common.models import load_trainable
from common.processes import use_all_cores
from common.training.report import train_and_report
from common.training.training_arguments import TrainingSettings
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo-video.yaml"


@dataclass
class VideoArguments:
    image_model: str = field(
        default="outputs/demo", metadata={"help": "Image captioner to start from: a folder or a name on the Hub."}
    )
    temporal_contextualizer: bool = field(
        default=True,
        metadata={"help": "Let frames see each other inside a transformer tower; without it a video is their mean."},
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    video, data, generation, training = parse_arguments(
        VideoArguments, DataArguments, GenerationArguments, TrainingSettings, argv=argv, recipe=DEMO_RECIPE
    )
    if data.video_column is None:
        raise ValueError("`video_column` is needed: the column of videos.")
    use_all_cores(training.device)
    set_seed(training.seed)
    with training.main_process_first(desc="preparing model and data"):
        if data.dataset == EMOJI_VIDEOS:
            data.dataset = str(load_emoji_videos())
        train, test = load_captions(data, training.seed)
        load = EVLGenForConditionalGeneration.from_pretrained
        if video.temporal_contextualizer:
            load = EVLGenForConditionalGeneration.from_image_model
        model = load_trainable("image_model", load, video.image_model)
        processor = EVLGenProcessor.from_pretrained(video.image_model)
        processor.num_frames = data.num_frames
    return train_and_report(model, processor, train, test, test, data, generation, training)


if __name__ == "__main__":
    main()
