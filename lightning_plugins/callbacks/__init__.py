"""Callbacks that work with any LightningModule."""

from lightning_plugins.callbacks.exact_resume import ExactResume
from lightning_plugins.callbacks.flood_loss import flood
from lightning_plugins.callbacks.flooding import Flooding
from lightning_plugins.callbacks.generative_evaluation import GenerativeEvaluation
from lightning_plugins.callbacks.gradient_penalty import GradientPenalty
from lightning_plugins.callbacks.manual_penalty import gradient_penalty_backward
from lightning_plugins.callbacks.non_finite_guard import NonFiniteGuard
from lightning_plugins.callbacks.ode_diagnostics import ODEDiagnostics
from lightning_plugins.callbacks.ode_plots import plot_ode_diagnostics
from lightning_plugins.callbacks.random_state import RandomState
from lightning_plugins.callbacks.save_on_sigterm import SaveOnSigterm

__all__ = [
    "ExactResume",
    "Flooding",
    "GenerativeEvaluation",
    "GradientPenalty",
    "NonFiniteGuard",
    "ODEDiagnostics",
    "RandomState",
    "SaveOnSigterm",
    "flood",
    "gradient_penalty_backward",
    "plot_ode_diagnostics",
]
