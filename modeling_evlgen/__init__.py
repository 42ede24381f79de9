"""EVLGen's model: a vision tower, a connector that merges tokens, and a language model.

Importing this package registers its classes with transformers' Auto classes. Checkpoints then load with this code,
instead of the copy that they hold.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from configuration_evlgen import EVLGenConfig

from .connectors import MLPConnector, QFormerConnector, QFormerConnectorOutput, register_connector
from .explanations import ExplainedWord, explain
from .modeling_evlgen import EVLGenForConditionalGeneration, EVLGenModel
from .soft_prompts import EVLGenImageOutput
from .texts import limit_logits, target_positions
from .token_merging import TokenMerging, bipartite_soft_matching
from .tomeformer import TomeFormerModel, TomeFormerOutput

for model_class in (TomeFormerModel, QFormerConnector, MLPConnector):
    AutoConfig.register(model_class.config_class.model_type, model_class.config_class, exist_ok=True)
    AutoModel.register(model_class.config_class, model_class, exist_ok=True)
AutoConfig.register(EVLGenConfig.model_type, EVLGenConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(EVLGenConfig, EVLGenForConditionalGeneration, exist_ok=True)

__all__ = [
    "EVLGenForConditionalGeneration",
    "EVLGenImageOutput",
    "EVLGenModel",
    "ExplainedWord",
    "MLPConnector",
    "QFormerConnector",
    "QFormerConnectorOutput",
    "TokenMerging",
    "TomeFormerModel",
    "TomeFormerOutput",
    "bipartite_soft_matching",
    "explain",
    "limit_logits",
    "register_connector",
    "target_positions",
]
