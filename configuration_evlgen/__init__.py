"""Configuration of EVLGen: what a model is made of, without a single tensor."""

from .configuration_evlgen import EVLGenConfig, TomeFormerConfig

__all__ = ["EVLGenConfig", "TomeFormerConfig"]
