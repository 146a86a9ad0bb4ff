"""Optimisers, usable by name wherever an ``optimizer:`` is asked for."""

from lightning_plugins.optim.norm_rmsprop import NormRMSprop

__all__ = ["NormRMSprop"]
