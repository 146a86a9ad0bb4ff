"""PyTorch Lightning parts for ideas that are famous on paper and poorly served in code.

The names below are what users write in YAML (``class_path: CapsNet``). Each is loaded when it is first asked for,
so that importing the package costs nothing: neither torch nor a Hugging Face library is imported by it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_plugins.callbacks import RandomState, SaveOnSigterm
    from lightning_plugins.capsnet import CapsNet
    from lightning_plugins.data import Digits, HFImages, IdxImages, MultiMNIST

__version__ = "0.1.0"

_PUBLIC = {
    "CapsNet": "lightning_plugins.capsnet",
    "Digits": "lightning_plugins.data",
    "HFImages": "lightning_plugins.data",
    "IdxImages": "lightning_plugins.data",
    "MultiMNIST": "lightning_plugins.data",
    "RandomState": "lightning_plugins.callbacks",
    "SaveOnSigterm": "lightning_plugins.callbacks",
}

__all__ = ["CapsNet", "Digits", "HFImages", "IdxImages", "MultiMNIST", "RandomState", "SaveOnSigterm"]


def __getattr__(name: str) -> type:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(_PUBLIC)}.")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
