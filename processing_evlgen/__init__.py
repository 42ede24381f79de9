"""EVLGen's processors and pipelines. Importing this package registers the processors with transformers."""

from transformers import AutoProcessor, AutoVideoProcessor

from configuration_evlgen import EVLGenConfig

from .pipeline_evlgen import EVLGenImageToTextPipeline
from .processing_evlgen import EVLGenProcessor
from .token_ids import clean_caption
from .video_processing_evlgen import EVLGenVideoProcessor

AutoProcessor.register(EVLGenConfig, EVLGenProcessor, exist_ok=True)
AutoVideoProcessor.register(EVLGenConfig, EVLGenVideoProcessor, exist_ok=True)

__all__ = ["EVLGenImageToTextPipeline", "EVLGenProcessor", "EVLGenVideoProcessor", "clean_caption"]
