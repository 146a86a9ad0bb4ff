"""What a checkpoint file says about its model, and whether the command line contradicts it. Files are only read."""

import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_only

from lightning_plugins.cli.checkpoint_rules import (
    arguments_of,
    class_of,
    refuse_deletions,
    refuse_no_file,
    refuse_other_names,
    sharded_content,
)
from lightning_plugins.cli.explain import argument_names, import_object
from lightning_plugins.cli.messages import UsageError, did_you_mean
from lightning_plugins.core.checkpoint_damage import damage
from lightning_plugins.core.hyperparameters import LINKED
from lightning_plugins.core.lightning_internals import CLASS_PATH, INSTANTIATOR


@rank_zero_only
def tell(lines: Iterable[str]) -> None:
    """Write lines to stderr, once however many processes there are."""
    sys.stderr.write("".join(f"{line}\n" for line in lines))


def read_hyperparameters(path: Path, resumes: bool = False) -> dict[str, Any]:
    """The constructor's arguments in a checkpoint; empty if it was saved without.

    Args:
        path: the checkpoint.
        resumes: whether training goes on, whose callbacks delete old checkpoints.

    Raises:
        UsageError: the file is missing, empty, truncated, damaged, or not a whole Lightning checkpoint.
    """
    if not path.exists():
        near = [str(other) for other in path.parent.glob("*.ckpt")]
        raise UsageError(f"checkpoint {str(path)!r} does not exist.", did_you_mean(str(path), near))
    content = sharded_content(path) if path.is_dir() else _content(path)
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        keys = f" (it holds {', '.join(map(str, list(content)[:5]))})" if isinstance(content, dict) and content else ""
        raise UsageError(f"{str(path)!r} is not a Lightning checkpoint{keys}.")
    if resumes:
        refuse_deletions(path, content)
    return arguments_of(path, content)


def _content(path: Path) -> Any:
    """What a file holds; weights stay on the disk."""
    refuse_no_file(path)
    try:
        what = damage(path)
    except OSError as error:
        raise UsageError(f"checkpoint {str(path)!r} cannot be read: {error.strerror}.") from error
    if what:
        raise UsageError(f"checkpoint {str(path)!r} {what}. Use an earlier one.")
    try:
        # mapped, so that only the description is read, not the weights
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UsageError(*_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> list[str]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and (match := re.search(r"GLOBAL (\S+)", str(error))):
        return [f"checkpoint {str(path)!r} holds an object of {match[1]}; only plain values can be loaded safely."]
    return [f"{str(path)!r} is not a Lightning checkpoint, or is damaged."]


def model_config(path: Path, hparams: dict[str, Any], given: Namespace | None) -> dict[str, Any]:
    """The ``model`` entry of a config, as the checkpoint has it.

    Files may hold what the data offers to all classes; one that takes none of it goes without.

    Args:
        path: the checkpoint, for the sentences.
        hparams: its hyperparameters.
        given: the model the user named, if any; needed for a checkpoint made in Python, which has no class path.

    Raises:
        UsageError: the class is not imported, contradicts the given one, or no longer takes one of the arguments; or an
            argument names what is not imported, or is no part of a model.
    """
    asked = given.class_path if given is not None else None
    class_path = hparams.get(CLASS_PATH, asked)
    if class_path is None:
        raise UsageError(
            f"{str(path)!r} does not say which class it holds (it was made in Python): add --model and the class."
        )
    cls = class_of(path, class_path)
    if asked is not None and import_object(asked) is not cls:
        raise UsageError(f"--model {_short(asked)} was given, but {str(path)!r} holds a {_short(class_path)}.")
    refuse_other_names(path, hparams, cls, plain(given.get("init_args")) if given is not None else None)
    names = argument_names(class_path)
    hparams = {key: value for key, value in hparams.items() if key not in (INSTANTIATOR, CLASS_PATH)}
    hparams = {key: value for key, value in hparams.items() if key in names or key not in LINKED}
    unknown = [key for key in hparams if key not in names]
    if unknown and not _takes_anything(cls):
        raise UsageError(
            f"{str(path)!r} was made by another version of {_short(class_path)}: "
            f"it has no argument {', '.join(map(repr, unknown))} now."
        )
    return {"class_path": class_path, "dict_kwargs": hparams}


def refuse_overrides(path: Path, explicit: Namespace | None, before: Namespace, after: Namespace) -> None:
    """Refuse what the user gave and the checkpoint would silently replace.

    Args:
        path: the checkpoint.
        explicit: the model entry with only what the user gave, by flag or config.
        before: the model entry as parsed from the user's words and the defaults.
        after: the model entry with the checkpoint's values.

    Raises:
        UsageError: a given value differs from the checkpoint's.
    """
    if explicit is None or "init_args" not in explicit:
        return
    for key in explicit.init_args.keys():  # noqa: SIM118 (a Namespace, not a dict)
        given, kept = plain(before.init_args.get(key)), plain(after.init_args.get(key))
        if given != kept:
            raise UsageError(
                f"model.{key} is {kept!r} in {str(path)!r}, but {given!r} was given, and the checkpoint's would win.",
                "Leave it out to go on with the checkpoint, or leave out --ckpt_path to start anew.",
            )


def explain_mismatch(error: RuntimeError, path: Any, name: str) -> UsageError:
    """One sentence for torch's list of weights that do not fit."""
    missing = re.findall(r'"(\S+?)"', "".join(re.findall(r"Missing key\(s\).*?: (.*)", str(error))))
    surplus = re.findall(r'"(\S+?)"', "".join(re.findall(r"Unexpected key\(s\).*?: (.*)", str(error))))
    sizes = re.findall(r"size mismatch for (\S+?):.*?torch.Size\((.*?)\).*?torch.Size\((.*?)\)", str(error))
    hints = []
    for what, keys in (("It lacks", missing), ("It has beside them", surplus)):
        if keys:
            hints.append(f"{what}: {keys[0]}" + (f" and {len(keys) - 1} more" if keys[1:] else ""))
    if sizes:
        hints.append("Other sizes: {}, {} there, {} here".format(*sizes[0]))
    return UsageError(f"the weights in {str(path)!r} do not fit this {name}.", *hints)


def plain(value: Any) -> Any:
    """Values from YAML, flags and files in one form, so that they compare: lists are tuples, namespaces dicts."""
    if isinstance(value, Namespace):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def _short(class_path: str) -> str:
    return class_path.rpartition(".")[2]


def _takes_anything(cls: type) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(cls).parameters.values())
