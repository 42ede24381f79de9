"""Configuration of EVLGen: what a model is made of, without a single tensor."""

from .configuration_connectors import (
    CONNECTOR_CONFIGS,
    ConnectorConfig,
    MLPConnectorConfig,
    QFormerConnectorConfig,
    TomeFormerConfig,
    connector_config_class,
)
from .configuration_evlgen import EVLGenConfig

__all__ = [
    "CONNECTOR_CONFIGS",
    "ConnectorConfig",
    "EVLGenConfig",
    "MLPConnectorConfig",
    "QFormerConnectorConfig",
    "TomeFormerConfig",
    "connector_config_class",
]
