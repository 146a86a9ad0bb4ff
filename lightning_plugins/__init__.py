"""PyTorch Lightning parts for ideas that are famous on paper and poorly served in code.

The names below are what users write in YAML (``class_path: CapsNet``). Each is loaded when it is first asked for,
so that importing the package costs nothing: neither torch nor a Hugging Face library is imported by it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_plugins.callbacks import (
        Flooding,
        GenerativeEvaluation,
        GradientPenalty,
        NonFiniteGuard,
        ODEDiagnostics,
        RandomState,
        SaveOnSigterm,
        flood,
        gradient_penalty_backward,
        plot_ode_diagnostics,
    )
    from lightning_plugins.capsnet import CapsNet
    from lightning_plugins.core.checkpoint_io import AtomicCheckpointIO, keep_checkpoints_whole
    from lightning_plugins.data import (
        Digits,
        HFImages,
        IdxImages,
        MultiMNIST,
        PromptData,
        PythonDocstrings,
        Seq2SeqData,
    )
    from lightning_plugins.eae import EAE, entropy_gap, knn_entropy
    from lightning_plugins.metrics import (
        BirthdayParadox,
        FrechetDistance,
        GenerationScores,
        KernelDistance,
        PrecisionRecallDensityCoverage,
    )
    from lightning_plugins.optim import NormRMSprop
    from lightning_plugins.replay.recorder import is_replaying
    from lightning_plugins.sid import DiffusionTeacher, SiD
    from lightning_plugins.unilm import UniLMSeq2Seq, plot_masks

__version__ = "0.1.0"

_PUBLIC = {
    "EAE": "lightning_plugins.eae",
    "AtomicCheckpointIO": "lightning_plugins.core.checkpoint_io",
    "BirthdayParadox": "lightning_plugins.metrics",
    "CapsNet": "lightning_plugins.capsnet",
    "DiffusionTeacher": "lightning_plugins.sid",
    "Digits": "lightning_plugins.data",
    "Flooding": "lightning_plugins.callbacks",
    "FrechetDistance": "lightning_plugins.metrics",
    "GenerationScores": "lightning_plugins.metrics",
    "GenerativeEvaluation": "lightning_plugins.callbacks",
    "GradientPenalty": "lightning_plugins.callbacks",
    "HFImages": "lightning_plugins.data",
    "IdxImages": "lightning_plugins.data",
    "KernelDistance": "lightning_plugins.metrics",
    "MultiMNIST": "lightning_plugins.data",
    "NonFiniteGuard": "lightning_plugins.callbacks",
    "NormRMSprop": "lightning_plugins.optim",
    "ODEDiagnostics": "lightning_plugins.callbacks",
    "PrecisionRecallDensityCoverage": "lightning_plugins.metrics",
    "PromptData": "lightning_plugins.data",
    "PythonDocstrings": "lightning_plugins.data",
    "RandomState": "lightning_plugins.callbacks",
    "SaveOnSigterm": "lightning_plugins.callbacks",
    "Seq2SeqData": "lightning_plugins.data",
    "SiD": "lightning_plugins.sid",
    "UniLMSeq2Seq": "lightning_plugins.unilm",
    "entropy_gap": "lightning_plugins.eae",
    "flood": "lightning_plugins.callbacks",
    "gradient_penalty_backward": "lightning_plugins.callbacks",
    "is_replaying": "lightning_plugins.replay.recorder",
    "keep_checkpoints_whole": "lightning_plugins.core.checkpoint_io",
    "knn_entropy": "lightning_plugins.eae",
    "plot_masks": "lightning_plugins.unilm",
    "plot_ode_diagnostics": "lightning_plugins.callbacks",
}

__all__ = [
    "EAE",
    "AtomicCheckpointIO",
    "BirthdayParadox",
    "CapsNet",
    "DiffusionTeacher",
    "Digits",
    "Flooding",
    "FrechetDistance",
    "GenerationScores",
    "GenerativeEvaluation",
    "GradientPenalty",
    "HFImages",
    "IdxImages",
    "KernelDistance",
    "MultiMNIST",
    "NonFiniteGuard",
    "NormRMSprop",
    "ODEDiagnostics",
    "PrecisionRecallDensityCoverage",
    "PromptData",
    "PythonDocstrings",
    "RandomState",
    "SaveOnSigterm",
    "Seq2SeqData",
    "SiD",
    "UniLMSeq2Seq",
    "entropy_gap",
    "flood",
    "gradient_penalty_backward",
    "is_replaying",
    "keep_checkpoints_whole",
    "knn_entropy",
    "plot_masks",
    "plot_ode_diagnostics",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(_PUBLIC)}.")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
