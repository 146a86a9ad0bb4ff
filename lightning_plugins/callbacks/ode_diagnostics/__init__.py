"""ODEDiagnostics: training seen as steps of an ODE solver.

Read in this order: ``optimizer_flow.py`` (which flow an optimizer steps along), ``rows.py`` (what is logged),
``callback.py`` (a step, from its gradient to its rows), ``probe.py`` (the gradient after it, and the sharpness).
"""

from lightning_plugins.callbacks.ode_diagnostics.callback import ODEDiagnostics
from lightning_plugins.callbacks.ode_diagnostics.figure import plot_ode_diagnostics

__all__ = ["ODEDiagnostics", "plot_ode_diagnostics"]
