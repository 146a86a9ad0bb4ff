"""The model of a checkpoint, for commands without a Trainer. Imports nothing heavy before it is wanted."""

import os
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

import lightning_plugins
from lightning_plugins.cli.messages import UsageError, did_you_mean
from lightning_plugins.core.replacing import is_sharded

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def checkpoint_file(ckpt_path: str, hint: str = "") -> Path:
    """The file, or a sharded checkpoint's folder, meant by ``--ckpt_path``; ``last`` is the newest run's below here.

    Args:
        ckpt_path: the option's value.
        hint: what to do with another folder.

    Raises:
        UsageError: it is empty or another folder, or ``last`` and there is none.
    """
    if not ckpt_path:
        raise UsageError("--ckpt_path is empty: give a checkpoint file, or `last` for the newest run's.")
    if os.path.isdir(ckpt_path) and not is_sharded(ckpt_path):
        raise UsageError(f"--ckpt_path {ckpt_path!r} is a folder; give a checkpoint file.", hint)
    if ckpt_path == "last":
        from lightning_plugins.cli.last_run import find_last

        return find_last(Path())
    return Path(ckpt_path)


def load_model(path: Path, class_path: str | None, methods: Sequence[str], otherwise: str) -> Any:
    """The model of a checkpoint in evaluation mode, on the GPU if there is one.

    Args:
        path: the checkpoint.
        class_path: the class that the user named, needed for a checkpoint made in Python.
        methods: what the class must have.
        otherwise: what is said of a class without them, such as ``"writes no text"``.

    Raises:
        UsageError: the file cannot be read, its class lacks a method, or its weights do not fit.
    """
    import torch
    from lightning.pytorch import LightningModule

    from lightning_plugins.cli import checkpoint
    from lightning_plugins.cli.explain import explain, import_object
    from lightning_plugins.core.checkpoint_data import module_of_folder, taken_by

    hparams = checkpoint.read_hyperparameters(path)
    given = None if class_path is None else Namespace(class_path=_full_path(class_path))
    if given is not None:  # the user's word imports, not the file's
        try:
            named = import_object(given.class_path)
        except (ImportError, AttributeError, ValueError) as error:
            raise UsageError(f"--model {class_path!r} cannot be imported: {error}.") from error
        if not (isinstance(named, type) and issubclass(named, LightningModule)):
            raise UsageError(f"--model {class_path!r} is no LightningModule.")
    cls = import_object(checkpoint.model_config(path, hparams, given)["class_path"])
    _refuse_other_classes(cls, path, methods, otherwise)
    try:
        if is_sharded(path):
            model = module_of_folder(cls, path, "cpu")
        else:
            source = taken_by(cls, path, hparams, "cpu", weights_only=True)
            model = cls.load_from_checkpoint(source, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise UsageError(
                f"{str(path)!r} asks for more memory than there is: {str(error).splitlines()[0]}"
            ) from error
        if "in loading state_dict" not in str(error):
            raise
        raise checkpoint.explain_mismatch(error, path, cls.__name__) from error
    except ArgumentError as error:  # the parser, asked by Lightning, calls the model a module
        raise explain(error.message.replace('"module.', '"model.', 1), ArgumentParser()) from error
    except (ValueError, OSError, ModuleNotFoundError) as error:  # the last: an extra, such as lora, is missing
        raise UsageError(str(error)) from error
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
    ) as error:  # what it holds is of another form
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        last = traceback.extract_tb(error.__traceback__)[-1]
        hint = f"Raised in {last.filename}, line {last.lineno}"
        raise UsageError(f"{str(path)!r} cannot be loaded as a {cls.__name__} ({reason}).", hint) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _full_path(class_path: str) -> str:
    if "." in class_path or class_path in lightning_plugins._PUBLIC:
        return class_path if "." in class_path else f"lightning_plugins.{class_path}"
    hint = did_you_mean(class_path, lightning_plugins._PUBLIC)
    raise UsageError(f"--model: no class is called {class_path!r}; give the path of your own, such as my.Net.", hint)


def _refuse_other_classes(cls: type["LightningModule"], path: Path, methods: Sequence[str], otherwise: str) -> None:
    missing = [name for name in methods if not hasattr(cls, name)]
    if missing:
        raise UsageError(
            f"{str(path)!r} holds a {cls.__name__}, which {otherwise} (it has no {' and no '.join(missing)}).",
            f"Its predictions: lightning-plugins predict --ckpt_path {path} --data CLASS",
        )
