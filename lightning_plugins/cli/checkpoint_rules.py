"""What a checkpoint from elsewhere may hold and name. It is data: nothing is imported or run because it says so."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

import lightning_plugins
from lightning_plugins.cli.messages import UsageError
from lightning_plugins.core.checkpoint_data import arguments_in
from lightning_plugins.core.checkpoint_shards import describe_sharded
from lightning_plugins.core.lightning_internals import INSTANTIATOR
from lightning_plugins.core.named_parts import check_named_parts, imported_object
from lightning_plugins.core.replacing import is_sharded

_TRUST = "If you trust it, import it in the module of your --model class, or name it in a --config."
_OTHERS = "If you trust it, name it in a --config, too, or define it in the package of your --model class."
_NAMED = {"last_model_path", "best_k_models", "kth_best_model_path", "best_model_path"}  # by a ModelCheckpoint
_INSTANTIATORS = (None, "lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")


def refuse_no_file(path: Path) -> None:
    """Refuse what is there but is no file to be read.

    Raises:
        UsageError: it is a device or a pipe, or may not be read.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint {str(path)!r} is no file but a device or a pipe: give a checkpoint file.")
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
    try:
        return arguments_in(content)
    except ValueError as error:
        raise UsageError(f"{told} {error}.") from error


def refuse_deletions(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose ModelCheckpoint would delete, as an old checkpoint, what may be none of the run's.

    Raises:
        UsageError: what it names.
    """
    states = content.get("callbacks")
    for state in states.values() if isinstance(states, Mapping) else ():
        if not isinstance(state, Mapping) or not _NAMED & state.keys():
            continue  # of another callback
        best = state.get("best_k_models")
        old = [*(best if isinstance(best, Mapping) else ())]
        old += [state.get("last_model_path"), state.get("kth_best_model_path")]
        for text, strict in [*((text, True) for text in old), (state.get("best_model_path"), False)]:
            if isinstance(text, str) and text:
                _refuse_deletion(path, text, str(state.get("dirpath")), strict)


def _refuse_deletion(path: Path, text: str, folder: str, strict: bool) -> None:
    if _is_address(text):
        raise UsageError(
            f"{str(path)!r}: its callbacks name {text!r}, which a resumed run may delete.",
            "If it is your own run's, resume from its address: --ckpt_path and the address.",
        )
    if not _is_in(text, folder, strict):
        raise UsageError(f"{str(path)!r}: its callbacks name {text!r}, which may lie outside of the run.")


def _is_address(text: str) -> bool:
    return "://" in text or "::" in text or text.startswith(("file:", "local:"))


def _is_in(text: str, folder: str, strict: bool) -> bool:
    """Whether it lies in the folder, with no step out of it by ``..`` or a link; else, if not strict, by no ``..``.

    The best checkpoint may be of the run before; Lightning deletes it only where the new run lies.
    """
    if "\0" in text or os.path.normpath(text).count("..") < text.count(".."):
        return False
    if not text.startswith(os.path.join(folder, "")):
        return not strict
    inner = os.path.relpath(os.path.dirname(text), folder)
    return os.path.realpath(os.path.dirname(text)) == os.path.normpath(os.path.join(os.path.realpath(folder), inner))


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


def refuse_other_names(path: Path, arguments: Mapping[str, Any], cls: type, given: Any = None) -> None:
    """Refuse arguments that name what is not imported, or is no part of a model.

    Raises:
        UsageError: which one.
    """
    if (maker := arguments.get(INSTANTIATOR)) not in _INSTANTIATORS:
        raise UsageError(f"{str(path)!r}: it wants to be made by {maker!r}, which is not Lightning's.")
    try:
        check_named_parts(arguments, cls, given)
    except ValueError as error:
        cures = {"not imported": _TRUST, "no part of a model": _OTHERS}
        cure = next((cure for words, cure in cures.items() if words in str(error)), "")
        raise UsageError(f"{str(path)!r}: {error}.", cure) from error


def sharded_content(folder: Path) -> dict[str, Any]:
    """What a sharded checkpoint's folder holds, but for the numbers of its weights.

    Raises:
        UsageError: it is no sharded checkpoint, is damaged, or would run code when it is read.
    """
    if not is_sharded(folder) and (folder / "latest").is_file():
        raise UsageError(
            f"--ckpt_path {str(folder)!r} is a folder of DeepSpeed's, whose files are pickles; it is not opened.",
            "Make a checkpoint file of it: lightning.pytorch.utilities.deepspeed has a function for it.",
        )
    if not is_sharded(folder):
        raise UsageError(f"--ckpt_path {str(folder)!r} is a folder without a sharded checkpoint; give a file.")
    try:
        return describe_sharded(folder)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
