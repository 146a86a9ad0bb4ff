"""What a checkpoint from elsewhere may hold and name. It is data: nothing is imported or run because it says so."""

import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from lightning.pytorch import LightningModule

import lightning_plugins
from lightning_plugins.cli.messages import UsageError
from lightning_plugins.core.checkpoint_data import arguments_in
from lightning_plugins.core.named_parts import check_named_parts, imported_object

_TRUST = "If you trust it, name what imports it: --model and your class by its path, or a --config."
_INSTANTIATORS = (None, "lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")
_SHARDS = "torch.distributed.checkpoint."
_SHARD_VALUES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
}


def refuse_no_file(path: Path) -> None:
    """Refuse what is there but is no file to be read.

    Raises:
        UsageError: it is a folder, a device or a pipe, or may not be read.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file but a device or a pipe"
        raise UsageError(f"checkpoint {str(path)!r} is {what}: give a checkpoint file.")
    if not os.access(path, os.R_OK):
        raise UsageError(f"checkpoint {str(path)!r} may not be read: its permissions forbid it.")


def arguments_of(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments in a checkpoint whose form is as Lightning writes it.

    Raises:
        UsageError: it is not.
    """
    told = f"{str(path)!r} is not a whole checkpoint:"
    state, version = content["state_dict"], content["pytorch-lightning_version"]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise UsageError(f"{told} its state_dict holds no weights by name.")
    if not isinstance(version, str) or not re.match(r"\d+\.\d+", version):
        raise UsageError(f"{told} it was written by Lightning {version!r}, which is no version.")
    for text in _texts(content.get("callbacks")):
        if ".." in PurePath(text).parts or text.startswith(("file:", "local:")):  # Lightning deletes old checkpoints
            raise UsageError(f"{str(path)!r}: its callbacks name {text!r}, which may lie outside of the run.")
    try:
        return arguments_in(content)
    except ValueError as error:
        raise UsageError(f"{told} {error}.") from error


def _texts(value: Any) -> Iterator[str]:
    """Every text in nested values, keys included."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def class_of(path: Path, class_path: Any) -> type[LightningModule]:
    """The class that a checkpoint names, if it is this package's or imported already.

    Raises:
        UsageError: it is neither, or no LightningModule.
    """
    told = f"{str(path)!r} is of the class {class_path!r}"
    public = isinstance(class_path, str) and class_path.removeprefix("lightning_plugins.")
    if public in lightning_plugins._PUBLIC:
        cls = getattr(lightning_plugins, public)
    else:
        try:
            cls = imported_object(str(class_path))
        except LookupError:
            trust = (
                "If you trust it, import it yourself: --model and the class by its path, or a --config that names it."
            )
            raise UsageError(f"{told}, which is not imported, and a checkpoint imports nothing.", trust) from None
    if not (isinstance(cls, type) and issubclass(cls, LightningModule)):
        raise UsageError(f"{told}, which is no LightningModule.")
    return cls


def refuse_other_names(path: Path, arguments: Mapping[str, Any], cls: type) -> None:
    """Refuse arguments that name what is not imported, or is no part of a model.

    Raises:
        UsageError: which one.
    """
    if (maker := arguments.get("_instantiator")) not in _INSTANTIATORS:
        raise UsageError(f"{str(path)!r}: it wants to be made by {maker!r}, which is not Lightning's.")
    try:
        check_named_parts(arguments, cls)
    except ValueError as error:
        raise UsageError(f"{str(path)!r}: {error}.", _TRUST if "not imported" in str(error) else "") from error


class _ShardIndex(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, which torch reads by ``pickle``, with nothing but its own classes."""

    def find_class(self, module: str, name: str) -> Any:
        of_torch = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        own = module.startswith(_SHARDS) and "." not in name and isinstance(getattr(_module(module), name, None), type)
        if own or of_torch or (module, name) in _SHARD_VALUES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def _module(name: str) -> Any:
    """A module of torch's that it has imported itself."""
    import sys

    import torch.distributed.checkpoint  # noqa: F401

    return sys.modules.get(name)


def check_sharded(folder: Path) -> None:
    """Refuse a folder that is no sharded checkpoint, or whose index would run code.

    Raises:
        UsageError: in that case.
    """
    index = folder / ".metadata"
    if not index.is_file():
        raise UsageError(f"--ckpt_path {str(folder)!r} is a folder without a sharded checkpoint; give a file.")
    try:
        with index.open("rb") as file:
            _ShardIndex(file).load()
    except Exception as error:  # a damaged pickle raises anything
        reason = f"an object of {error}" if isinstance(error, pickle.UnpicklingError) else "no index"
        raise UsageError(f"sharded checkpoint {str(folder)!r} holds {reason}; it is not opened.") from error
