"""Configs and recipes that ship with the package, by their short names. Imports nothing heavy."""

import ast
import importlib.resources
import re
from pathlib import Path

from lightning_plugins.cli.messages import UsageError, did_you_mean

_SUFFIX = {"configs": ".yaml", "recipes": ".py"}


def shipped(kind: str) -> dict[str, Path]:
    """Every shipped file of a kind, by its short name (``capsnet/digits``), in alphabetical order.

    Args:
        kind: ``configs`` or ``recipes``.
    """
    try:
        folder = Path(str(importlib.resources.files(f"lightning_plugins.{kind}")))
    except ModuleNotFoundError:  # a bare clone, not installed
        folder = Path(__file__).parents[2] / kind
    paths = sorted(folder.rglob(f"*{_SUFFIX[kind]}"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths if path.stem != "__init__"}


def resolve_config(name: str) -> Path:
    """The file meant by ``--config NAME``: a path that exists, else a shipped name.

    Raises:
        UsageError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    configs = shipped("configs")
    short = name.removesuffix(".yaml")
    if short in configs:
        return configs[short]
    raise UsageError(
        f"no file and no shipped config is called {name!r}.",
        did_you_mean(short, configs),
        "All configs: lightning-plugins list",
    )


def headline(path: Path) -> str:
    """First line of a config's header comment or of a recipe's docstring; empty if there is none."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        return text.split("\n", 1)[0].lstrip("# ").strip() if text.startswith("#") else ""
    return (ast.get_docstring(ast.parse(text)) or "").split("\n", 1)[0]


def command_that_writes(folder: str) -> str:
    """The command of a shipped config that writes a folder, by its keys or the words on its head; empty if none does.

    >>> command_that_writes("digits_teacher")
    'lightning-plugins fit --config sid/digits_teacher'
    """
    for name, path in shipped("configs").items():
        text = path.read_text(encoding="utf-8")
        if re.search(rf"^ *export_to: {re.escape(folder)}$", text, re.MULTILINE):
            return f"lightning-plugins fit --config {name}"
        for found in re.finditer(r"lightning-plugins fit .*(\n# +--.*)*", text):
            command = " ".join(found[0].replace("\n#", " ").split())
            if f"--model.export_to {folder}" in command.split(" --trainer")[0]:
                return command
    return ""
