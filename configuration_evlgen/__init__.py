"""The configuration of EVLGen and its parts. This package builds no tensors."""

from .configuration_connectors import (
    CONNECTOR_CONFIGS,
    ConnectorConfig,
    MLPConnectorConfig,
    QFormerConnectorConfig,
    TomeFormerConfig,
    connector_config_class,
)
from .configuration_evlgen import EVLGenConfig, read_budgets

__all__ = [
    "CONNECTOR_CONFIGS",
    "ConnectorConfig",
    "EVLGenConfig",
    "MLPConnectorConfig",
    "QFormerConnectorConfig",
    "TomeFormerConfig",
    "connector_config_class",
    "read_budgets",
]
