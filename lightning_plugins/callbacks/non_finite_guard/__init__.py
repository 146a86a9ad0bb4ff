"""NonFiniteGuard: a step with NaN or infinity in it is raised, left out, or ends the run.

Read in this order: ``verdict.py`` (what is looked at, the same on all ranks), ``callback.py``, ``report.py``.
"""

from lightning_plugins.callbacks.non_finite_guard.callback import NonFiniteGuard

__all__ = ["NonFiniteGuard"]
