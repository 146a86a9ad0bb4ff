"""``load_from_checkpoint`` for files from elsewhere: Lightning 2.6 guards the class that a file names, not the rest."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from lightning_plugins.core.checkpoint_damage import refuse_damage
from lightning_plugins.core.checkpoint_shards import describe_sharded, read_sharded
from lightning_plugins.core.hyperparameters import not_taken
from lightning_plugins.core.lightning_internals import INSTANTIATOR, load_any, module_of
from lightning_plugins.core.named_parts import check_named_parts, nothing_imported_for
from lightning_plugins.core.replaced_arguments import loading
from lightning_plugins.core.replacing import is_sharded

Module = TypeVar("Module", bound=type[LightningModule])
_OLD_KEYS = ("hparams", "module_arguments")  # Lightning still reads them
_ClassMethod: Any = type(vars(LightningModule)["load_from_checkpoint"])  # which refuses to be called on an object


def arguments_in(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments in a checkpoint's content, as Lightning gathers them.

    Raises:
        ValueError: what stands there are no arguments.
    """
    arguments: dict[str, Any] = {}
    for key in (*_OLD_KEYS, "hyper_parameters"):
        found = checkpoint.get(key) or {}
        if key in _OLD_KEYS and not isinstance(found, Mapping):
            try:
                found = dict(found)  # Lightning takes pairs, too
            except (TypeError, ValueError):
                continue  # a module's own
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise ValueError(f"its {key} are no arguments by name")
        arguments.update(found)
    return arguments


def read_as_data(cls: Module) -> Module:
    """Class decorator: ``load_from_checkpoint`` refuses a damaged file, and imports nothing because a file says so.

    Without it Lightning would import a module of the current folder that a file of the command line names as the
    optimizer. ``weights_only`` is True by default for every address, where Lightning's is False for ``http``.
    """

    def load_from_checkpoint(
        cls: Any,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Lightning's, for files from elsewhere: nothing that they name is imported.

        Raises:
            OSError: the file, or one of a sharded checkpoint's folder, is missing, empty, truncated or damaged.
            ValueError: an argument in the file names what is not imported, or is no part of a model; a folder holds
                what is no data.
        """
        refuse_damage(checkpoint_path)
        weights_only = True if weights_only is None else weights_only
        if hparams_file is not None and is_sharded(checkpoint_path):
            raise ValueError(
                f"hparams_file={str(hparams_file)!r} is not read for the folder of a sharded checkpoint: give the "
                "arguments themselves, or make one file of it by `lightning-plugins consolidate`."
            )
        arguments = _read(checkpoint_path, weights_only) | kwargs
        if INSTANTIATOR in arguments:  # only then are names looked up
            try:
                check_named_parts({key: value for key, value in arguments.items() if key not in kwargs}, cls)
            except ValueError as error:
                raise ValueError(f"{str(checkpoint_path)!r}: {error}. {_cure(error)}") from None
        if is_sharded(checkpoint_path):
            return module_of_folder(cls, checkpoint_path, map_location, strict, **kwargs)
        with loading(), nothing_imported_for({key: value for key, value in arguments.items() if key not in kwargs}):
            source = taken_by(cls, checkpoint_path, arguments, map_location, weights_only)
            return super(made, cls).load_from_checkpoint(
                source, map_location, hparams_file, strict, weights_only, **kwargs
            )

    made: Any = cls
    made.load_from_checkpoint = _ClassMethod(load_from_checkpoint)
    return cls


def taken_by(cls: Any, source: Any, arguments: Mapping[str, Any], map_location: Any, weights_only: bool) -> Any:
    """A checkpoint whose arguments the class takes: the file itself, or a copy without what others take of the data.

    Lightning would hand them to a class with ``**kwargs``. They are in files of earlier versions, and in those of
    classes that save their arguments by ``save_hyperparameters``.

    Args:
        cls: the class to be made.
        source: the file, as ``load_from_checkpoint`` takes it.
        arguments: those in the file.
        map_location: where tensors go, as for ``torch.load``.
        weights_only: as for ``torch.load``.
    """
    surplus = not_taken(cls, arguments) if INSTANTIATOR in arguments else set()
    if not surplus:
        return source
    place = map_location if map_location or torch.cuda.is_available() else "cpu"
    content = _without(load_any(source, weights_only, place), surplus)
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def module_of_folder(cls: Any, folder: Any, map_location: Any, strict: bool | None = None, **arguments: Any) -> Any:
    """What ``load_from_checkpoint`` makes of a file, of a sharded checkpoint's folder; optimizers are not read.

    Args:
        cls: the class to be made.
        folder: the checkpoint.
        map_location: where the module goes, as for ``torch.load``.
        strict: as for ``load_from_checkpoint``.
        **arguments: the caller's own, which win over the checkpoint's.

    Raises:
        OSError: a file in the folder is missing, truncated or damaged.
        ValueError: the folder holds what is no data.
    """
    content = read_sharded(Path(folder), optimizers=False)
    found = {**arguments_in(content), **arguments}
    content = _without(content, not_taken(cls, found) if INSTANTIATOR in found else set())
    with loading(), nothing_imported_for({key: value for key, value in found.items() if key not in arguments}):
        return module_of(cls, content, strict, arguments).to(_device(map_location))


def _device(map_location: Any) -> torch.device:
    """Where ``torch.load`` puts a tensor that was saved on the CPU."""
    file = io.BytesIO()
    torch.save(torch.zeros(()), file)
    file.seek(0)
    return torch.load(file, map_location=map_location, weights_only=True).device


def _without(content: dict[str, Any], surplus: set[str]) -> dict[str, Any]:
    for key in (*_OLD_KEYS, "hyper_parameters"):
        if isinstance(content.get(key), dict):
            content[key] = {name: value for name, value in content[key].items() if name not in surplus}
    return content


def _cure(error: ValueError) -> str:
    way = "import it before" if "not imported" in str(error) else "give the argument yourself, which is then not read"
    return f"If you trust it, {way}."


def _read(source: Any, weights_only: bool) -> dict[str, Any]:
    """The arguments in a file, an address or an open file, which is left where it was."""
    if is_sharded(source):
        content = describe_sharded(Path(source))
    elif hasattr(source, "seek"):
        start = source.tell()
        content = load_any(source, weights_only)
        source.seek(start)
    elif zipfile.is_zipfile(source):
        content = torch.load(source, map_location="cpu", weights_only=weights_only, mmap=True)
    else:
        content = load_any(source, weights_only)
    return arguments_in(content)
