"""GradientPenalty: a penalty on the norm of the loss's gradient, for any module.

Read in this order: ``callback.py`` (one optimizer step), ``term.py`` (the formula), ``repeatable.py`` and
``displacement.py`` (what is checked, and how far parameters move), and in ``replay`` ``window.py`` (the loss as a
function of the parameters) and ``recorder.py`` (how a training_step is run again).
"""

from lightning_plugins.callbacks.gradient_penalty.callback import GradientPenalty
from lightning_plugins.callbacks.gradient_penalty.manual import gradient_penalty_backward

__all__ = ["GradientPenalty", "gradient_penalty_backward"]
