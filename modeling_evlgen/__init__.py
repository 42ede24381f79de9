"""EVLGen's model: token merging, the TomeFormer connector and the model that ties it to a vision tower and an LLM.

Importing this package makes the classes known to transformers' Auto classes, so `AutoModel.from_pretrained` takes them
from here rather than from a checkpoint's own copy.
"""

from .tomeformer import TomeFormerModel, TomeFormerOutput
from .token_merging import TokenMerging, bipartite_soft_matching

__all__ = ["TokenMerging", "TomeFormerModel", "TomeFormerOutput", "bipartite_soft_matching"]
