"""Callbacks that work with any LightningModule."""

from lightning_plugins.callbacks.random_state import RandomState

__all__ = ["RandomState"]
