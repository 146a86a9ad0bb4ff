"""Callbacks that work with any LightningModule."""

from lightning_plugins.callbacks.random_state import RandomState
from lightning_plugins.callbacks.save_on_sigterm import SaveOnSigterm

__all__ = ["RandomState", "SaveOnSigterm"]
