"""The parser's own error text, often fifty lines long, read and told again in a sentence with the closest names."""

import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

import lightning_plugins
from lightning_plugins.cli.messages import UsageError, closest, did_you_mean, join_or
from lightning_plugins.core import hyperparameters

_UNIVERSAL = ("LightningModule", "LightningDataModule")


@dataclass(frozen=True)
class _Complaint:
    """The innermost reason of the first branch that the parser tried."""

    key: str  # dotted, as on the command line: model.iterations
    class_path: str  # the class whose argument it is; empty at the top
    reason: str
    types: str  # what the value might have been, as the parser writes it
    value: str


def explain(message: str, parser: ArgumentParser) -> UsageError:
    """Translate the parser's message; what is not recognised keeps its own first lines.

    Args:
        message: the text given to ``ArgumentParser.error``.
        parser: the (sub-command's) parser that gave it.
    """
    if match := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        word = match[1].split()[0]
        if not word.startswith("-"):
            return UsageError(f"{parser.prog.split()[-1]} takes options only, not {word!r}.")
        return _unknown_option(word.split("=")[0], parser)
    if match := re.match(r"Subcommand '(.*)' does not accept option '(.*)'", message):
        return _unknown_option(match[2], parser._subcommands_action.choices[match[1]])
    if match := re.match(r"argument (\S+): expected one argument", message):
        return UsageError(f"{match[1].split('/')[-1]} needs a value.")
    if message.startswith("Problems parsing config"):
        where = " ".join(message.removeprefix("Problems parsing config: ").split())
        return UsageError(f"not valid YAML: {where}.")
    if message.startswith("Unexpected config"):
        return UsageError("a config holds keys and values, such as `model: CapsNet`; this one is empty or a list.")
    complaint = _innermost(message)
    return _explain_complaint(complaint) if complaint.key else UsageError(message.strip())


def _innermost(message: str) -> _Complaint:
    keys, class_path, reason, types = [], "", "", ""
    for line in message.splitlines():
        line = re.sub(r"^Type .* expects a function or a callable class: ", "", line.strip().removeprefix("- "))
        if match := re.match(r'Parser key "(.*?)"(?: element \d+)?:(.*)', line):
            keys.append(match[1])
            reason, types = match[2].strip(), ""
        elif match := re.match(r"Problem with given class_path '(.*)':(.*)", line):
            class_path, reason, types = match[1], match[2].strip(), ""
        elif match := re.match(r"Subtypes: \[(.*)\]", line):
            types = re.sub(r"Callable\[\[.*?\], ", "Callable[", match[1])
        elif line and not line.startswith(("Expected a path but", "Does not validate", "Errors:")):
            reason = line
        if reason:
            break
    rest = message[message.find(reason) :]
    given = re.search(r"Got value: (.*)", reason) or re.search(r"Given value: (.*)", rest)
    value = given[1].split(". Got value: ")[0] if given else ""
    if match := re.search(r"Got value: Namespace\(class_path='(.*?)'", reason):
        class_path = match[1]
    if match := re.match(r"NestedArg\(.*val=(.*)\)$", value):
        value = match[1].strip("'")
    return _Complaint(".".join(keys), class_path, re.sub(r"\. Got value: .*", "", reason), types, value)


def _explain_complaint(c: _Complaint) -> UsageError:
    if match := re.match(r"Option '(.*)' is not accepted", c.reason):
        return _unknown_argument(c, match[1])
    if match := re.match(r"Expected a dot import path string: (.*)", c.reason):
        return _unknown_class(c, match[1])
    if match := re.match(r"Multiple subclasses with name (\w+)\..*?: (.*?),", c.reason):
        return UsageError(f"{c.key}: several classes are called {match[1]}; give the full path, such as {match[2]}.")
    if match := re.match(r"Import path does not correspond to a subclass of (.*)", c.reason):
        return UsageError(f"{c.key} takes a {match[1]}, and {c.value!r} is not one.")
    if re.match(r"(No module named|module '.*' has no attribute)", c.reason):
        module, _, name = c.class_path.rpartition(".")
        hint = did_you_mean(name, _names_in(module)) if "has no attribute" in c.reason else ""
        where = "Looked in the current folder and in the installed packages."
        return UsageError(f"{c.key}: cannot import {c.class_path!r} ({c.reason}).", hint, where)
    if "Literal[" in c.reason:
        groups = re.findall(r"Literal\[(.*?)\]", c.types or c.reason)
        names = list(dict.fromkeys(name.strip(" '\"") for group in groups for name in group.split(",")))
        hints = did_you_mean(c.value, names), f"Choices: {', '.join(names)}"
        return UsageError(f"{c.key} has no choice {c.value!r}.", *hints)
    if match := re.match(r"Expected an? (.*)", c.reason):
        kinds = [_kind(kind) for kind in re.split(r", (?![^\[]*\])", c.types)] if c.types else [_kind(match[1])]
        return UsageError(f"{c.key} takes {join_or(dict.fromkeys(kinds))}, not {c.value!r}.")
    return UsageError(f"{c.key}: {c.reason}")


def _kind(text: str) -> str:
    """``<class 'int'>`` as ``int``, ``NoneType`` as ``null``."""
    name = re.sub(r"<class '(?:.*\.)?(.*?)'>", r"\1", text)
    return {"NoneType": "null", "bool": "true/false"}.get(name, name)


def _unknown_argument(c: _Complaint, name: str) -> UsageError:
    short = c.class_path.rpartition(".")[2]
    if short in _UNIVERSAL:
        if not c.value.startswith("{"):
            first = c.key.split(".")[0]
            return UsageError(f"--{c.key}.{name} comes before the class is known: give --{first} or --config first.")
        words = ("class_path", "init_args", "dict_kwargs")
        top = re.sub(r"\{.*\}", "", c.value[1:-1])  # without what stands under init_args
        wrong = next((key for key in re.findall(r"'(\w+)': ", top) if key not in words), name)
        hint = did_you_mean(wrong, words) or f"Arguments such as {wrong!r} stand under init_args."
        return UsageError(f"{c.key} has class_path and init_args, not {wrong!r}.", hint)
    names = argument_names(c.class_path)
    return UsageError(
        f"{short} has no argument {name!r} ({c.key}.{name}).",
        did_you_mean(name, names),
        f"All of them: {', '.join(names) or 'none'}" if len(names) <= 8 else f"All of them: --{c.key}.help {short}",
    )


def _unknown_class(c: _Complaint, name: str) -> UsageError:
    bases = [base for base in map(import_object, re.findall(r"[\w.]+\.[A-Z]\w+", c.types)) if inspect.isclass(base)]
    if not bases:
        return UsageError(f"{c.key} has no class {name!r}.", "Give a class's full path: package.module.Class")
    names = class_names(bases)
    known = f"Known: {', '.join(names)}" if len(names) <= 8 else ""
    own = "A class of your own is given by its path: package.module.Class"
    return UsageError(f"no {bases[0].__name__} is called {name!r} ({c.key}).", did_you_mean(name, names), known, own)


def _unknown_option(option: str, parser: ArgumentParser) -> UsageError:
    command = parser.prog.split()[-1]
    options = _options(parser)
    word = option.lstrip("-")
    if word.split(".")[0] not in {name.split(".")[0] for name in options}:  # a wrong first word: the rest says nothing
        option, word = option.split(".")[0], word.split(".")[0]
    full = {**{name.rpartition(".")[2]: name for name in reversed(options)}, **{name: name for name in options}}
    meant = list(dict.fromkeys(f"--{full[name]}" for name in closest(word, full)))
    hint = f"Did you mean {join_or(meant)}?" if meant else ""
    page = "--trainer.help" if word.startswith("trainer.") else "--help"
    return UsageError(f"{command} has no option {option!r}.", hint, f"All options: lightning-plugins {command} {page}")


def unknown_key(key: str, class_path: str, parser: ArgumentParser) -> UsageError:
    """Tell of a key that nothing takes.

    Args:
        key: dotted, as on the command line.
        class_path: the class whose argument it was meant to be; empty if it stands elsewhere.
        parser: of the sub-command.
    """
    above, _, name = key.rpartition(".")
    return (
        _unknown_argument(_Complaint(above, class_path, "", "", ""), name)
        if class_path
        else _unknown_option(key, parser)
    )


def _options(parser: ArgumentParser) -> list[str]:
    """Every option's dotted name, with the arguments of the shipped models and data."""
    options = [action.dest for action in parser._actions if action.option_strings and "help" not in action.dest]
    for name in lightning_plugins._PUBLIC:
        part = getattr(lightning_plugins, name)
        for base, key in ((LightningModule, "model"), (LightningDataModule, "data")):
            if isinstance(part, type) and issubclass(part, base):
                options += [f"{key}.{argument}" for argument in argument_names(f"lightning_plugins.{name}")]
    return list(dict.fromkeys(options))


def argument_names(class_path: str) -> list[str]:
    """Names of the constructor's arguments that the parser accepts, a parent's through ``**kwargs`` included."""
    return hyperparameters.argument_names(import_object(class_path))


def class_names(bases: Iterable[type]) -> list[str]:
    """Short names of all public classes known to derive from ``bases``."""
    found, todo = set(), list(bases)
    while todo:
        for child in todo.pop().__subclasses__():
            todo.append(child)
            hidden = any(part.startswith("_") for part in f"{child.__module__}.{child.__qualname__}".split("."))
            if not hidden and not inspect.isabstract(child) and "<locals>" not in child.__qualname__:
                found.add(child.__name__)
    return sorted(found)


def import_object(path: str) -> Any:
    """The object at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _names_in(module: str) -> list[str]:
    return [name for name in dir(importlib.import_module(module)) if not name.startswith("_")]
