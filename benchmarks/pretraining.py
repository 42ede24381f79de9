"""Prepares a model and its data as `examples/pretrain.py` does, for the comparisons that train."""

from pathlib import Path
from typing import Any, NamedTuple

import pretrain
from transformers import set_seed

from common.command_line import parse_arguments
from common.data.data_arguments import DataArguments
from common.data.feature_cache import FeatureDataset, cache_features
from common.data.loading import load_datasets
from common.evaluation.evaluation_arguments import GenerationArguments
from common.models import build_model
from common.training.training_arguments import EVLGenTrainingArguments
from common.training.whiten import whiten_vision_projection
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor


class Prepared(NamedTuple):
    """A new model with its data and arguments, ready for training."""

    model: EVLGenForConditionalGeneration
    processor: EVLGenProcessor
    train_dataset: FeatureDataset
    eval_dataset: FeatureDataset
    data_args: DataArguments
    generation_args: GenerationArguments
    training_args: EVLGenTrainingArguments


def parse_recipe(arguments: dict[str, Any], recipe: Path) -> tuple[Any, ...]:
    """Parses arguments of `examples/pretrain.py`, those of a recipe by default. None leaves an argument out."""
    given = {"eval_strategy": "no", "save_strategy": "no"}
    given |= {name: value for name, value in arguments.items() if value is not None}
    argv = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return parse_arguments(*pretrain.ARGUMENTS, argv=argv, recipe=recipe)


def prepare_training(parsed: tuple[Any, ...]) -> Prepared:
    """Loads the data and builds the model of parsed arguments, with cached features and a whitened projection."""
    model_args, processor_args, data_args, generation_args, training_args = parsed
    set_seed(training_args.seed)
    splits = load_datasets(data_args, training_args.seed)
    model, processor = build_model(model_args, processor_args)
    train_dataset, eval_dataset = cache_features(model, processor, *splits, data_args, training_args.seed)
    whiten_vision_projection(model, processor, train_dataset, data_args, model_args.whitening_images)
    return Prepared(model, processor, train_dataset, eval_dataset, data_args, generation_args, training_args)
