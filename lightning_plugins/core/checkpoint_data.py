"""``load_from_checkpoint`` for files from elsewhere: Lightning 2.6 guards the class that a file names, not the rest."""

import io
import zipfile
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from lightning_plugins.core.checkpoint_damage import refuse_damage
from lightning_plugins.core.hyperparameters import not_taken
from lightning_plugins.core.lightning_internals import INSTANTIATOR, load_any
from lightning_plugins.core.named_parts import check_named_parts, nothing_imported_for
from lightning_plugins.core.replaced_arguments import loading

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
            OSError: the file is empty, truncated or damaged.
            ValueError: an argument in the file names what is not imported, or is no part of a model.
        """
        refuse_damage(checkpoint_path)
        weights_only = True if weights_only is None else weights_only
        arguments = _read(checkpoint_path, weights_only) | kwargs
        if INSTANTIATOR in arguments:  # only then are names looked up
            try:
                check_named_parts({key: value for key, value in arguments.items() if key not in kwargs}, cls)
            except ValueError as error:
                raise ValueError(f"{str(checkpoint_path)!r}: {error}. {_cure(error)}") from None
        source = taken_by(cls, checkpoint_path, arguments, map_location, weights_only)
        with loading(), nothing_imported_for({key: value for key, value in arguments.items() if key not in kwargs}):
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
    content = load_any(source, weights_only, place)
    for key in (*_OLD_KEYS, "hyper_parameters"):
        if isinstance(content.get(key), dict):
            content[key] = {name: value for name, value in content[key].items() if name not in surplus}
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def _cure(error: ValueError) -> str:
    way = "import it before" if "not imported" in str(error) else "give the argument yourself, which is then not read"
    return f"If you trust it, {way}."


def _read(source: Any, weights_only: bool) -> dict[str, Any]:
    """The arguments in a file, an address or an open file, which is left where it was."""
    if hasattr(source, "seek"):
        start = source.tell()
        content = load_any(source, weights_only)
        source.seek(start)
    elif zipfile.is_zipfile(source):
        content = torch.load(source, map_location="cpu", weights_only=weights_only, mmap=True)
    else:
        content = load_any(source, weights_only)
    return arguments_in(content)
