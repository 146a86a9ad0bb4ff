"""GenerativeEvaluation: metrics of a module's samples in any module's validation.

Read in this order: ``callback.py``, ``reference_images.py``.
"""

from lightning_plugins.callbacks.generative_evaluation.callback import GenerativeEvaluation

__all__ = ["GenerativeEvaluation"]
