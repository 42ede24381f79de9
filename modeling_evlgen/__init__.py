"""EVLGen's model: token merging, the TomeFormer connector and the model that ties it to a vision tower and an LLM.

Importing this package makes its classes known to transformers' Auto classes, so that a checkpoint loads with this code
rather than with the copy that it carries.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from configuration_evlgen import EVLGenConfig, MLPConnectorConfig, QFormerConnectorConfig, TomeFormerConfig

from .connectors import MLPConnector, QFormerConnector
from .modeling_evlgen import EVLGenForConditionalGeneration, EVLGenImageOutput
from .token_merging import TokenMerging, bipartite_soft_matching
from .tomeformer import TomeFormerModel, TomeFormerOutput

for config_class, model_class in (
    (TomeFormerConfig, TomeFormerModel),
    (QFormerConnectorConfig, QFormerConnector),
    (MLPConnectorConfig, MLPConnector),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
AutoConfig.register(EVLGenConfig.model_type, EVLGenConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForImageTextToText):
    auto_class.register(EVLGenConfig, EVLGenForConditionalGeneration, exist_ok=True)

__all__ = [
    "EVLGenForConditionalGeneration",
    "EVLGenImageOutput",
    "MLPConnector",
    "QFormerConnector",
    "TokenMerging",
    "TomeFormerModel",
    "TomeFormerOutput",
    "bipartite_soft_matching",
]
