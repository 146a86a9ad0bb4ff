"""The argument parser: short errors, and ``--config`` by shipped name."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from lightning_plugins.cli.explain import explain
from lightning_plugins.cli.messages import UsageError
from lightning_plugins.cli.passed_over import refuse_unknown_keys
from lightning_plugins.cli.resolve import resolve_config

_reading: ContextVar[str] = ContextVar("_reading", default="")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Errors inside name the file that is being read."""
    token = _reading.set(name)
    try:
        yield
    finally:
        _reading.reset(token)


class Parser(LightningArgumentParser):
    """A parser whose mistakes take five lines at most and name the closest valid words."""

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
