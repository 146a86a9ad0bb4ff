"""Flooding: a training loss that stays above a level.

Read in this order: ``loss.py`` (the formula), ``callback.py`` (one sign per optimizer step, for any module).
"""

from lightning_plugins.callbacks.flooding.callback import Flooding
from lightning_plugins.callbacks.flooding.loss import flood

__all__ = ["Flooding", "flood"]
