"""One rule for constructor arguments, so that a checkpoint describes its module and loads with ``weights_only=True``.

Plain values (None, numbers, strings, and lists, tuples, sets and dicts of them) are stored. Anything else (a network,
an optimiser factory, a lambda) cannot be kept in a safe file: its place is marked, and building the module from the
file asks for it again in one sentence. Under the command line every argument is a config entry, plain by birth.
"""

import inspect
import numbers
import os
from collections.abc import Collection
from types import FrameType
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin

from lightning_plugins.core.lightning_internals import (
    INSTANTIATOR,
    given_hyperparameters,
    giving_hyperparameters,
    running_constructors,
)

LINKED = ("image_shape", "num_classes", "num_labels")  # what the data decides for every model that takes it
_MARK = "not-stored-in-the-checkpoint "


def save_plain_hyperparameters(module: HyperparametersMixin) -> None:
    """Save the constructor's arguments as ``module.hparams``; call it right after ``super().__init__()``.

    What is saved are the arguments of the outermost ``__init__``, so ``type(module)(**hparams)`` builds the module
    again, also for a subclass that adds arguments or fixes some of its parent's. A class must therefore read its own
    attributes, never ``self.hparams``: a parent's default that a subclass did not pass on is not in there.

    Args:
        module: the LightningModule or LightningDataModule being constructed.

    Raises:
        ValueError: an argument came from a checkpoint that could not hold its value.
    """
    if (given := given_hyperparameters()) is not None:
        for name in not_taken(type(module), given):
            del given[name]
        module.save_hyperparameters()  # the command line's own record: class path and plain values
        return
    arguments = constructor_arguments(module)
    name = type(module).__name__
    for key, value in arguments.items():
        if isinstance(value, str) and value.startswith(_MARK):
            raise ValueError(
                f"The checkpoint does not hold {name}'s argument {key!r} ({value.removeprefix(_MARK)}). "
                f"Give it again: {name}.load_from_checkpoint(path, {key}=...)."
            )
    plain = {key: _plain_or_mark(value) for key, value in arguments.items()}
    # Through the context, because Lightning would first deep-copy and warn about every network among the arguments.
    with giving_hyperparameters(plain):
        module.save_hyperparameters(ignore=[INSTANTIATOR])


def argument_names(cls: Any) -> list[str]:
    """Names of a constructor's arguments that the command line takes, a parent's through ``**kwargs`` included."""
    return [*argument_defaults(cls)]


def argument_defaults(cls: Any) -> dict[str, Any]:
    """Defaults of these arguments, by name."""
    parser = LightningArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(cls, fail_untyped=False)
    return {action.dest: action.default for action in parser._actions if action.dest != "==SUPPRESS=="}


def not_taken(cls: Any, arguments: Collection[str]) -> set[str]:
    """Which of a class's recorded arguments it does not take: Lightning notes for every class what is linked to any."""
    linked = {*LINKED}.intersection(arguments)
    return linked.difference(argument_names(cls)) if linked else linked


def constructor_arguments(module: object) -> dict[str, Any]:
    """Arguments of the outermost ``__init__`` that is running on ``module``, by name."""
    frames = running_constructors(module)
    if not frames:
        raise RuntimeError("save_plain_hyperparameters(self) must be called inside __init__.")
    return _frame_arguments(frames)


def _frame_arguments(frames: list[FrameType]) -> dict[str, Any]:
    names, varargs, keywords, values = inspect.getargvalues(frames[-1])
    arguments = {name: values[name] for name in names[1:]} | (values[keywords] if keywords else {})
    if varargs and values[varargs]:  # positional values without a name: the parent knows their names
        if len(frames) == 1:
            raise TypeError(f"{values[names[0]].__class__.__name__} must be given its arguments by name.")
        inner = frames[-2].f_code
        inner_names = inner.co_varnames[1 : inner.co_argcount]
        arguments |= dict(zip(inner_names, values[varargs], strict=False))
    return arguments


def _plain_or_mark(value: Any) -> Any:
    try:
        return _plain(value)
    except TypeError:
        return _MARK + getattr(value, "__qualname__", type(value).__qualname__)


def _plain(value: Any) -> Any:
    """``value`` in the types that a ``weights_only`` file can hold; TypeError if it has none."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):  # numpy's, or of an Enum
        return str.__str__(value)
    if type(value) in (list, tuple, set):
        return type(value)(_plain(item) for item in value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, numbers.Integral):  # numpy's integers, and below its floats
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(type(value))
