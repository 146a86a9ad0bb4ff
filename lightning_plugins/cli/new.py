"""``new``: a model or a callback of one's own to begin with: a class, a config and a test. Imports nothing heavy."""

import importlib.util
import keyword
import os
import re
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

import lightning_plugins
from lightning_plugins.cli.messages import UsageError
from lightning_plugins.cli.starters import CLASSES, CONFIGS, TESTS

EXAMPLES = """\
Three files are written into the current folder: the class with the hooks that most people change, a config that names
it, and a test. They run as they are, so that there is something to change step by step. Nothing is ever replaced.

  lightning-plugins new capsnet MyCapsNet           my_caps_net.py, my_caps_net.yaml, test_my_caps_net.py
  lightning-plugins fit --config my_caps_net.yaml   trains it on real handwritten digits
  lightning-plugins test --model my_caps_net.MyCapsNet --ckpt_path last --data Digits
  pytest test_my_caps_net.py                        seconds

capsnet, eae, unilm and sid are subclasses of CapsNet, EAE, UniLMSeq2Seq and SiD with arguments of their own; those of
the parent stay at hand (--model.lr). callback is for any model: --trainer.callbacks+=my_module.MyCallback
"""


def add_new_arguments(parser: ArgumentParser) -> None:
    """Add the words of ``new``."""
    part = "What it is: a subclass of a model, or a callback."
    parser.add_argument("part", choices=[*CLASSES], help=part)
    name = "The class's name, such as MyCapsNet; the files are named after it: my_caps_net.py."
    parser.add_argument("name", type=str, help=name)


def new(options: Namespace) -> None:
    """Write the three files, and tell how to go on.

    Raises:
        UsageError: the name is none for a class, or means something already, or a file is there.
    """
    name, module = options.name, _module_of(options.name)
    files = {f"{module}.py": CLASSES, f"{module}.yaml": CONFIGS, f"test_{module}.py": TESTS}
    there = [file for file in files if os.path.lexists(file)]
    if there:
        raise UsageError(f"{there[0]!r} exists and is not replaced; choose another name than {name}.")
    _refuse_taken(name, module)
    written: list[Path] = []
    try:
        for file, starters in files.items():
            with Path(file).open("x", encoding="utf-8") as out:
                written.append(Path(file))
                out.write(starters[options.part].replace("NAME", name).replace("MODULE", module))
    except BaseException as error:
        for path in written:
            path.unlink()
        if isinstance(error, OSError):
            raise UsageError(f"{file!r} cannot be written: {error.strerror}.") from error
        raise
    print(f"Written: {', '.join(files)}")
    print(f"Train it: lightning-plugins fit --config {module}.yaml\nTest it:  pytest test_{module}.py")


def _module_of(name: str) -> str:
    """``MyCapsNet`` as ``my_caps_net``.

    Raises:
        UsageError: it is no name of a class.
    """
    if not (re.fullmatch(r"[A-Z][A-Za-z0-9]*", name) and not keyword.iskeyword(name)):
        raise UsageError(
            f"{name!r} is no name for a class: letters and digits, a capital first, such as MyCapsNet.",
            f"Such as: {_suggested(name)}" if _suggested(name) else "",
        )
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _suggested(name: str) -> str:
    parts = re.findall(r"[A-Za-z0-9]+", name)
    word = "".join(part[:1].upper() + part[1:] for part in parts)
    return word if re.fullmatch(r"[A-Z][A-Za-z0-9]*", word) else ""


def _refuse_taken(name: str, module: str) -> None:
    """Refuse a name that would stand in the way of another."""
    if name in lightning_plugins._PUBLIC:
        raise UsageError(f"{name} is a class of this package; choose another name, such as My{name}.")
    if module in sys.stdlib_module_names or importlib.util.find_spec(module) is not None:
        raise UsageError(f"{module}.py would hide the module {module!r}; choose another name than {name}.")
