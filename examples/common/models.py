"""From what the command line says to a model and its processor."""

from typing import Any

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    TimmWrapperImageProcessor,
)

from common.arguments import DataArguments, ModelArguments
from common.demo_towers import prepare_language_model, prepare_vision_tower
from modeling_evlgen import EVLGenForConditionalGeneration
from processing_evlgen import EVLGenProcessor


def build_model(
    arguments: ModelArguments, data: DataArguments
) -> tuple[EVLGenForConditionalGeneration, EVLGenProcessor]:
    """Loads the towers, builds a connector between them, and the processor that fits.

    Returns:
        The model, whose generation stops where captions end, and its processor.
    """
    vision_model = arguments.vision_model or str(prepare_vision_tower())
    text_model = arguments.text_model or str(prepare_language_model())
    vision = _without_none(revision=arguments.vision_revision, trust_remote_code=arguments.trust_remote_code or None)
    text = _without_none(revision=arguments.text_revision, trust_remote_code=arguments.trust_remote_code or None)

    image_processor = load_image_processor(vision_model, **vision)
    model = EVLGenForConditionalGeneration.from_vision_text_pretrained(
        vision_model,
        text_model,
        connector_model=arguments.connector_model,
        connector_config=arguments.connector_config,
        image_size=image_processor.size["height"],
        dtype=arguments.dtype,
        **{f"vision_{name}": value for name, value in vision.items()},
        **{f"text_{name}": value for name, value in text.items()},
    )
    tokenizer = AutoTokenizer.from_pretrained(text_model, **text)
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit or tokenizer.model_max_length)
    if data.chat_template is not None:
        tokenizer.chat_template = data.chat_template or None
    processor = EVLGenProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=model.config.num_image_tokens,
        end_of_text=data.end_of_text,
        clean_captions=data.clean_captions,
        bos_label=data.bos_label,
    )
    model.generation_config.eos_token_id = processor.end_of_text_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def load_image_processor(vision_model: str, **kwargs: Any) -> Any:
    """The vision tower's image processor, set to the original's evaluation transform: a plain resize, no crop.

    A tower without one beside it gets CLIP's mean and standard deviation at 224 pixels. One of timm gets its own mean
    and standard deviation; timm's transforms crop.
    """
    try:
        image_processor = AutoImageProcessor.from_pretrained(vision_model, **kwargs)
    except (OSError, ValueError):
        return CLIPImageProcessor(size={"height": 224, "width": 224}, do_center_crop=False)
    if isinstance(image_processor, TimmWrapperImageProcessor):
        _, height, width = image_processor.data_config["input_size"]
        return CLIPImageProcessor(
            size={"height": height, "width": width},
            do_center_crop=False,
            image_mean=list(image_processor.data_config["mean"]),
            image_std=list(image_processor.data_config["std"]),
        )
    image_processor.do_center_crop = False
    size = dict(image_processor.size)
    if "height" not in size:
        side = size.get("shortest_edge", 224)
        image_processor.size = {"height": side, "width": side}
    return image_processor


def _without_none(**kwargs: Any) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if value is not None}
