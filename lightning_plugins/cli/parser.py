"""The argument parser: short errors, help that begins with a page, and ``--config`` by shipped name."""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from lightning_plugins.cli.explain import explain
from lightning_plugins.cli.messages import UsageError
from lightning_plugins.cli.passed_over import refuse_unknown_keys
from lightning_plugins.cli.resolve import resolve_config
from lightning_plugins.cli.short_help import short_help

_MOST_NAMES = 40
_reading: ContextVar[str] = ContextVar("_reading", default="")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors inside name the file that is being read."""
    token = _reading.set(name)
    try:
        yield
    finally:
        _reading.reset(token)


class _Formatter(DefaultHelpFormatter):
    """Does not list all of torch where an argument may be any ``nn.Module``."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        short, _, names = text.partition(", known subclasses: ")
        return f"{short})" if names.count(",") >= _MOST_NAMES else text


class Parser(LightningArgumentParser):
    """A parser whose mistakes take five lines at most and name the closest valid words."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Formatter, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with status 2, or raise where the caller tries several types in turn."""
        if not self.exit_on_error:
            super().error(message, ex)
        error = explain(message, self)
        if config := _reading.get():
            error.lines[0] = f"{config}: {error.lines[0]}"
        error.exit()


class ConfigFile(ActionConfigFile):
    """``--config`` with a path or the short name of a shipped config."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Merge the file into what was given before it."""
        with reading(values):
            file = resolve_config(values)
            super().__call__(parser, cfg, str(file), option_string)
            try:
                refuse_unknown_keys(file, cfg, parser)
            except UsageError as error:
                error.lines[0] = f"{values}: {error.lines[0]}"
                raise


class Help(argparse._HelpAction):
    """``--help`` is a page, ``--help all`` every option, with the Trainer's at the end."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.nargs, self.choices = "?", ("all",)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print it and leave."""
        if values == "all":
            of_trainer = parser.groups["trainer"]
            _print_groups(parser, [group for group in parser._action_groups if group is not of_trainer] + [of_trainer])
        else:
            print(short_help(parser.prog.split()[-1]), end="")
        parser.exit()


class TrainerHelp(argparse._HelpAction):
    """``--trainer.help``: the Trainer's options only."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print it and leave."""
        _print_groups(parser, [parser.groups["trainer"]])
        parser.exit()


def _print_groups(parser: Any, groups: list[Any]) -> None:
    """Print the help of these groups, with a usage of one line."""
    page = copy.copy(parser)
    page.usage, page.description = f"lightning-plugins {parser.prog.split()[-1]} [options]", None
    page._action_groups = groups
    page.print_help()
