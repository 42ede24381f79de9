"""Builds or loads a model and its processor, as a script's arguments request."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, CLIPImageProcessor, TimmWrapperImageProcessor
from transformers.utils import find_adapter_config_file, logging

from common.arguments import ModelArguments, ProcessorArguments
from common.demo.towers import prepare_language_model, prepare_vision_tower
from configuration_evlgen import CONNECTOR_CONFIGS
from modeling_evlgen import EVLGenForConditionalGeneration, register_connector
from processing_evlgen import EVLGenProcessor

logger = logging.get_logger(__name__)


def build_model(
    arguments: ModelArguments, text_format: ProcessorArguments
) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor]:
    """Loads the towers, or the demo's, and builds a connector and a processor. Misfits raise a ValueError."""
    vision_model = arguments.vision_model or str(prepare_vision_tower())
    text_model = arguments.text_model or str(prepare_language_model())
    image_processor = load_image_processor(vision_model, revision=arguments.vision_revision)
    if arguments.image_size is not None:
        image_processor.size = {"height": arguments.image_size, "width": arguments.image_size}
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        vision_model,
        text_model,
        connector_model=arguments.connector_model,
        connector_config=connector_fields(arguments.connector, arguments.connector_config or {}),
        image_size=image_processor.size["height"],
        dtype=arguments.dtype,
        vision_revision=arguments.vision_revision,
        text_revision=arguments.text_revision,
    )
    if ".py:" in arguments.connector:
        try_connector(arguments.connector, model)
    model.config.towers = arguments.towers
    if text_format.max_tiles > 1:
        model.config.check_tiles()
    tokenizer = AutoTokenizer.from_pretrained(text_model, revision=arguments.text_revision)
    # Some tokenizers allow longer texts than their language model has positions for.
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit or tokenizer.model_max_length)
    if text_format.chat_template is not None:
        tokenizer.chat_template = text_format.chat_template or None
    processor = EVLGenProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=model.config.num_image_tokens,
        end_of_text=text_format.end_of_text,
        clean_captions=text_format.clean_captions,
        bos_label=text_format.bos_label,
        max_tiles=text_format.max_tiles,
    )
    allow_token_range(model, processor, text_format.image_token_range, text_format.num_image_tokens)
    model.generation_config.eos_token_id = processor.end_of_text_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def allow_token_range(
    model: EVLGenForConditionalGeneration,
    processor: EVLGenProcessor,
    image_token_range: list[int] | None,
    num_image_tokens: int | None = None,
) -> None:
    """Lets a model serve any number of tokens of an image in a range, after a training that draws from it.

    `num_image_tokens` is the number without a request, by default the model's own. Raises a ValueError if the
    connector cannot make each of these numbers, or the number without a request is not among them.
    """
    if image_token_range is None:
        return
    low, high = image_token_range
    try:
        for number in range(low, high + 1):
            model.config.connector_config.check_budget(number, model.config.num_vision_tokens)
    except ValueError as error:
        raise ValueError(f"`image_token_range` is {image_token_range}: {error}") from error
    model.config.image_token_range = processor.image_token_range = [low, high]
    if num_image_tokens is not None:
        model.config.default_num_image_tokens = processor.num_image_tokens = num_image_tokens
    model.config.check_num_image_tokens()


def connector_fields(connector: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Selects a connector's fields, so that a recipe also works for another one. Unknown ones are refused later."""
    if ".py:" in connector:
        model_type = load_own_connector(connector).config_class.model_type
    else:
        model_type = {"tomeformer": "tomeformer", "qformer": "evlgen_qformer", "mlp": "evlgen_mlp"}[connector]
    known = set().union(*(config_class.__dataclass_fields__ for config_class in CONNECTOR_CONFIGS.values()))
    omitted = sorted(fields.keys() & known - CONNECTOR_CONFIGS[model_type].__dataclass_fields__.keys())
    if omitted:
        logger.warning(
            f"`connector_config`: {connector} has no fields {', '.join(omitted)}: the recipe's values are left out."
        )
    return {**{name: value for name, value in fields.items() if name not in omitted}, "model_type": model_type}


def load_own_connector(connector: str) -> type[torch.nn.Module]:
    """Imports and registers the connector `my_file.py:Name`. Raises a ValueError that names what is missing."""
    path, _, name = connector.rpartition(":")
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"`connector`={connector!r}: there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"connector_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise ValueError(f"`connector`={connector!r}: {path.name} has no class {name}.")
    register_connector(getattr(module, name))
    return getattr(module, name)


@torch.no_grad()
def try_connector(connector: str, model: EVLGenForConditionalGeneration) -> None:
    """Runs a connector of one's own once. Raises a ValueError if it does not make the tokens that it promises."""
    config = model.config.connector_config
    tokens = torch.zeros(1, model.config.num_vision_tokens, config.hidden_size)
    expected = (1, model.config.num_image_tokens, config.hidden_size)
    try:
        shape = tuple(model.connector(tokens, (1, 1), None, places=None).last_hidden_state.shape)
    except Exception as error:
        raise ValueError(f"`connector`={connector!r} fails on {tuple(tokens.shape)} tokens: {error}") from error
    if shape != expected:
        raise ValueError(f"`connector`={connector!r}: `last_hidden_state` must be {expected}, but is {shape}.")


def load_captioner(
    name_or_path: str,
    argument: str = "model",
    load: Callable = EVLGenForConditionalGeneration.from_pretrained,
    **kwargs: Any,
) -> Any:
    """Loads a model, or its processor. A missing one raises a ValueError that names `argument`."""
    try:
        return load(name_or_path, **kwargs)
    except OSError as error:
        hint = "; train it first, with examples/pretrain.py" if name_or_path == "outputs/demo" else ""
        raise ValueError(f"`{argument}`={name_or_path!r} cannot be loaded{hint}: {error}") from error


def load_trainable(name_or_path: str, argument: str = "model", **kwargs: Any) -> Any:
    """Loads as [`load_captioner`] does, to train further. An adapter is refused: it would not be trained."""
    if load_captioner(name_or_path, argument, find_adapter_config_file) is not None:
        raise ValueError(
            f"`{argument}`={name_or_path!r} is an adapter. Merge it into its model first: "
            f"python examples/publish.py --model {name_or_path} --merge true --folder MERGED"
        )
    return load_captioner(name_or_path, argument, **kwargs)


def load_image_processor(vision_model: str, **kwargs: Any) -> CLIPImageProcessor:
    """Creates the original's evaluation transform for a tower: a bicubic resize without a crop.

    Source: `BlipImageEvalProcessor` of the original (lavis/processors/blip_processors.py). Size, mean and standard
    deviation are those of the tower's own image processor. If it has none, they are CLIP's at 224 pixels, which is
    logged.
    """
    try:
        known = AutoImageProcessor.from_pretrained(vision_model, **kwargs)
    except (OSError, ValueError) as error:
        logger.warning(f"{vision_model} has no image processor, so CLIP's at 224 pixels is used: {error}")
        return CLIPImageProcessor(size={"height": 224, "width": 224}, do_center_crop=False)
    if isinstance(known, TimmWrapperImageProcessor):
        _, height, width = known.data_config["input_size"]
        mean, std = known.data_config["mean"], known.data_config["std"]
    else:
        size = known.crop_size if getattr(known, "do_center_crop", None) else known.size
        height, width = (size[name] or size["shortest_edge"] for name in ("height", "width"))
        mean, std = known.image_mean, known.image_std
    return CLIPImageProcessor(
        size={"height": height, "width": width}, do_center_crop=False, image_mean=list(mean), image_std=list(std)
    )
