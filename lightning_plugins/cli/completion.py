"""Completion scripts for the shell, by shtab."""

import sys
from argparse import Action
from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy

import lightning_plugins
from lightning_plugins.cli.explain import argument_names, class_names
from lightning_plugins.cli.messages import UsageError, join_or

_SHELLS = ("bash", "zsh", "tcsh")
_BASES = {"model": LightningModule, "data": LightningDataModule}
_TRAINER_BASES = {
    "trainer.callbacks": Callback,
    "trainer.logger": Logger,
    "trainer.plugins": Precision,
    "trainer.profiler": Profiler,
    "trainer.strategy": Strategy,
}


def print_completion(parser: ArgumentParser, words: Sequence[str]) -> NoReturn:
    """Answer ``--print_completion SHELL`` with a script on stdout, and leave.

    Raises:
        UsageError: the shell is not one of shtab's.
    """
    shell = " ".join(words).replace("=", " ").split()[-1].removeprefix("shtab-")
    if shell not in _SHELLS:
        raise UsageError(f"--print_completion needs a shell: {join_or(_SHELLS)}.")
    for command in parser._subcommands_action.choices.values():
        for action in list(command._actions):
            if action.dest in _BASES:
                _offer_public_classes(command, action)
            elif action.dest in _TRAINER_BASES:
                action.choices = class_names([_TRAINER_BASES[action.dest]])
    print(parser.get_completion_script(f"shtab-{shell}"))
    sys.exit(0)


def _offer_public_classes(parser: ArgumentParser, action: Action) -> None:
    """Complete ``--model`` with the package's own classes and their arguments.

    Left to itself the parser walks through every class of every argument's type, and for a network among the
    arguments that is all of torch, again for each of their arguments.
    """
    key = action.dest
    parts = {name: getattr(lightning_plugins, name) for name in lightning_plugins._PUBLIC}
    names = [name for name, part in parts.items() if isinstance(part, type) and issubclass(part, _BASES[key])]
    action.choices = names
    arguments = [argument for name in names for argument in argument_names(f"lightning_plugins.{name}")]
    for argument in dict.fromkeys(arguments):
        parser.add_argument(f"--{key}.{argument}", type=str)
