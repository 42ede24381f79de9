"""EVLGen's processor and pipelines. Importing this package registers the processor with `AutoProcessor`."""

from transformers import AutoProcessor

from configuration_evlgen import EVLGenConfig

from .pipeline_evlgen import EVLGenImageToTextPipeline
from .processing_evlgen import EVLGenProcessor
from .prompts import clean_caption

AutoProcessor.register(EVLGenConfig, EVLGenProcessor, exist_ok=True)

__all__ = ["EVLGenImageToTextPipeline", "EVLGenProcessor", "clean_caption"]
