"""Pixels to soft prompt as one graph, for machines that have neither this repository nor transformers."""

from typing import Any

import torch
from torch import nn

from modeling_evlgen import EVLGenForConditionalGeneration
from modeling_evlgen.temporal import encode_images

PIXELS, PROMPT = "pixel_values", "soft_prompt"


class SoftPrompt(nn.Module):
    """All of a model but its language model, which is taken out of it: pixels → soft prompt.

    Args:
        model ([`EVLGenForConditionalGeneration`]): The model; good for nothing else afterwards.
    """

    def __init__(self, model: EVLGenForConditionalGeneration):
        super().__init__()
        model.language_model = nn.Identity()
        self.model = model.eval().requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)`): From the image processor.

        Returns:
            `torch.Tensor` of shape `(images, num_image_tokens, text_hidden_size)`, as [`get_image_features`] gives
            under `pooler_output`.
        """
        tower = self.model.vision_tower
        tokens = encode_images(tower, self.model.temporal, pixel_values.to(tower.dtype))
        return self.model.project_vision_features(tokens).pooler_output


def example_pixels(prompt: SoftPrompt, image_size: tuple[int, int], images: int, seed: int = 0) -> torch.Tensor:
    """Images of noise, `(images, channels, height, width)`, float32, of which no two tokens are alike."""
    channels = getattr(prompt.model.config.vision_config, "num_channels", 3)
    return torch.randn(images, channels, *image_size, generator=torch.Generator().manual_seed(seed))


def export_graph(prompt: SoftPrompt, image_size: tuple[int, int]) -> torch.export.ExportedProgram:
    """The graph of a model for any number of images.

    Args:
        prompt: What to export.
        image_size: Height and width of the images in pixels.
    """
    shapes = ({0: torch.export.Dim("images", min=1)},)
    # With gradients enabled a temporal contextualizer does not cut its batch into parts, whose number would be fixed.
    with torch.enable_grad():
        return torch.export.export(prompt, (example_pixels(prompt, image_size, 2),), dynamic_shapes=shapes)


def convert_to_onnx(program: torch.export.ExportedProgram) -> Any:
    """The graph in ONNX's operators, as a `torch.onnx.ONNXProgram`.

    Raises:
        ImportError: If the extra `export` is not installed.
    """
    try:
        return torch.onnx.export(program, input_names=[PIXELS], output_names=[PROMPT], verbose=False)
    except ImportError as error:
        raise ImportError('ONNX needs further packages. Install them with: pip install -e ".[export]"') from error


def relative_difference(prompt: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The largest difference in each image's soft prompt, over the largest value in it, `(images,)`."""
    return (prompt - other).abs().amax(dim=(1, 2)) / prompt.abs().amax(dim=(1, 2))
