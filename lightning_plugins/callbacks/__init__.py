"""Callbacks that work with any LightningModule, each in a folder of its own or, if it is short, in one file."""

from lightning_plugins.callbacks.exact_resume import ExactResume
from lightning_plugins.callbacks.flooding import Flooding, flood
from lightning_plugins.callbacks.generative_evaluation import GenerativeEvaluation
from lightning_plugins.callbacks.gradient_penalty import GradientPenalty, gradient_penalty_backward
from lightning_plugins.callbacks.non_finite_guard import NonFiniteGuard
from lightning_plugins.callbacks.ode_diagnostics import ODEDiagnostics, plot_ode_diagnostics
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
