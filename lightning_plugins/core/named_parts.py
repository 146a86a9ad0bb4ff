"""What a file from elsewhere may name: parts of models that are imported already. Nothing is imported for it."""

import functools
import importlib.abc
import inspect
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_PARTS: tuple[type, ...] = (nn.Module, Optimizer, LRScheduler)
_TEXT: tuple[type, ...] = (str, PathLike)
_AS_TEXT: tuple[type, ...] = (*_TEXT, int, float, Enum, type(None))
_PLAIN: tuple[type, ...] = (str, int, float, complex, type(None), Collection, PathLike, Enum)


def imported_object(path: str) -> Any:
    """The object at a dotted path, if its module is imported already.

    Raises:
        LookupError: it is not, or has no such name.
    """
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        module = sys.modules.get(".".join(names[:end]))
        if module is not None:
            try:
                return functools.reduce(getattr, names[end:], module)
            except (AttributeError, ImportError) as error:
                raise LookupError(path) from error
    raise LookupError(path)


class _Trust(NamedTuple):
    """Whose parts are taken beside torch's."""

    package: str
    names: frozenset[str] = frozenset()  # dotted paths that the user has named


def check_named_parts(arguments: Mapping[str, Any], cls: type, given: Any = None) -> None:
    """Refuse a constructor's arguments that name what is not imported, or what would do more than be a model's part.

    Args:
        arguments: plain values from a file. A ``class_path`` at any depth is a name; so is a dotted text where ``cls``
            takes a class or a function. Texts are looked at as the parser would read them, which is as YAML.
        cls: whose arguments they are. Of its own package every class may be named, of others modules, optimizers and
            schedulers; beside them the functions of ``torch.nn.functional``.
        given: the same arguments as the user gave them, if at all; what is named there may be named by the same
            argument here.

    Raises:
        ValueError: which one, and why.
    """
    given = given if isinstance(given, Mapping) else {}
    package = cls.__module__.partition(".")[0]
    for name, value in arguments.items():
        _check_arguments("", {name: value}, cls, _Trust(package, frozenset(_paths(given.get(name)))))


def _paths(value: Any) -> Iterator[str]:
    """Dotted paths in what the user gave: plain values, or functions that the parser has found already."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item)
    elif _is_dotted(value):
        yield value
    elif callable(value):
        yield f"{value.__module__}.{getattr(value, '__qualname__', '')}"


def _check_arguments(prefix: str, arguments: Mapping[Any, Any], cls: type | None, trust: _Trust) -> None:
    hints = _hints(cls) if cls else {}
    for name, value in arguments.items():
        if {"class_path", "init_args", "dict_kwargs"} & {*str(name).split(".")[1:]}:  # the parser would nest it
            raise ValueError(f"its {prefix}{name} is no argument's name")
        _check(f"{prefix}{name}", value, hints.get(name), trust)
    if "class_path" in arguments:
        _class_at(f"{prefix}class_path", arguments["class_path"], trust)


def _check(name: str, value: Any, hint: Any, trust: _Trust) -> None:
    if isinstance(value, Mapping):
        _check_mapping(name, value, hint, trust)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            _check(name, item, hint, trust)
    elif isinstance(value, str):
        if _takes_objects(hint) and _is_place(value):
            raise ValueError(f"its {name} is {value!r}, a file that would be read as settings")
        if not _is_plain(hint) and (meant := _as_read(value)) != value:
            _check(name, meant, hint, trust)
        elif _is_dotted(value) and _takes_objects(hint):
            _object_at(name, value, hint, trust)


def _check_mapping(name: str, value: Mapping[Any, Any], hint: Any, trust: _Trust) -> None:
    made = _class_at(name, value["class_path"], trust) if "class_path" in value else None
    for key, item in value.items():
        if key in ("init_args", "dict_kwargs"):
            settings = _as_read(item) if isinstance(item, str) else item
            if isinstance(settings, Mapping):
                _check_arguments(f"{name}.", settings, made, trust)
            elif settings is not None:
                raise ValueError(f"its {name} has {key} that are no settings by name")
        elif key != "class_path":
            _check(name, item, hint, trust)


def _object_at(name: str, path: str, hint: Any, trust: _Trust) -> None:
    """Refuse a dotted text that stands for what is no part."""
    try:
        part = imported_object(path)
    except LookupError:
        if not _takes_text(hint):
            raise ValueError(_not_imported(name, path)) from None
        return  # a text after all
    if not (_is_part(part) or not callable(part) or path in trust.names or _belongs_to(part, trust.package)):
        raise ValueError(f"its {name} names {path!r}, which is no part of a model")


def _class_at(name: str, path: Any, trust: _Trust) -> type | None:
    """The class that a ``class_path`` names; None for a short name, which only finds what is imported and fits."""
    if isinstance(path, str) and path.isidentifier():
        return None
    try:
        part = imported_object(path) if isinstance(path, str) else None
    except LookupError:
        raise ValueError(_not_imported(name, path)) from None
    if path in trust.names:
        return part if isinstance(part, type) else None
    if not (isinstance(part, type) and (_is_part(part) or _belongs_to(part, trust.package))):
        raise ValueError(f"its {name} names {path!r}, which is no part of a model")
    return part


def _not_imported(name: str, path: str) -> str:
    return f"its {name} names {path!r}, which is not imported, and a file imports nothing"


def _is_part(thing: Any) -> bool:
    if isinstance(thing, type):
        return issubclass(thing, _PARTS)
    return inspect.isroutine(thing) and getattr(nn.functional, thing.__name__, None) is thing


def _belongs_to(thing: Any, package: str) -> bool:
    """Whether it is of the model's own package, which the user imported; this one's own commands are no parts."""
    return package != "lightning_plugins" and (getattr(thing, "__module__", None) or "").partition(".")[0] == package


def _is_plain(hint: Any) -> bool:
    """Whether the parser leaves a text as it is: no object and nothing unknown is asked for."""
    if typing.get_origin(hint) is typing.Literal:
        return True
    if args := [one for one in typing.get_args(hint) if one is not Ellipsis]:
        return not _takes_objects(hint) and all(map(_is_plain, args))
    return isinstance(hint, type) and issubclass(hint, _AS_TEXT)


def _as_read(text: str) -> Any:
    """What the parser takes a text for: it may hold settings or quotes, and write letters by their numbers.

    Raises:
        ValueError: settings that cannot be looked at, as they hold themselves.
    """
    import yaml

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # reads as the parser's own, and makes no objects
    try:
        read = yaml.load(text, Loader=loader)
    except (yaml.constructor.ConstructorError, RecursionError) as error:
        raise ValueError("it holds a text with settings that hold themselves") from error
    except (yaml.YAMLError, ValueError):
        return text
    return text if read is None else read


def _is_place(text: str) -> bool:
    """Whether the parser would read settings from there: a file or an address."""
    try:
        return "://" in text or "::" in text or text.startswith("file:") or Path(text).expanduser().is_file()
    except (ValueError, OSError, RuntimeError):
        return False


def _is_dotted(value: Any) -> bool:
    return isinstance(value, str) and "." in value and all(name.isidentifier() for name in value.split("."))


def _hints(cls: type) -> dict[str, Any]:
    """Types of the constructor's arguments, those of parents included, as ``**kwargs`` hands them on."""
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        init = vars(base).get("__init__")
        if inspect.isfunction(init):
            try:
                hints |= typing.get_type_hints(init)
            except (NameError, TypeError, AttributeError):  # names for type checkers alone
                hints |= init.__annotations__
    return hints


def _takes_objects(hint: Any) -> bool:
    """Whether a text may stand for a class or a function."""
    if isinstance(hint, str):
        return True  # not known
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return False
    if Callable in (hint, origin) or hint is typing.Callable or origin is type:
        return True
    if origin is not None:
        return any(map(_takes_objects, typing.get_args(hint)))
    return isinstance(hint, type) and hint not in (object, Any) and not issubclass(hint, _PLAIN)


def _takes_text(hint: Any) -> bool:
    if isinstance(hint, str):
        return True  # not known
    if typing.get_origin(hint) in (typing.Union, UnionType, list, tuple, dict):
        return any(map(_takes_text, typing.get_args(hint)))
    return isinstance(hint, type) and issubclass(hint, _TEXT)


class _Refusal(importlib.abc.MetaPathFinder):
    """Stands before Python's own finders."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        del path, target
        if fullname in self.names:
            raise ModuleNotFoundError(f"{fullname!r} is not imported, and a file imports nothing", name=fullname)


@contextmanager
def nothing_imported_for(arguments: Any) -> Iterator[None]:
    """While these values are read, no module is imported whose name stands in them: the last lock behind the checks."""
    refusal = _Refusal({name for name in _module_names(arguments) if name not in sys.modules})
    sys.meta_path.insert(0, refusal)
    try:
        yield
    finally:
        sys.meta_path.remove(refusal)


def _module_names(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _module_names(item)
    elif isinstance(value, str):
        for path in re.findall(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+", value):
            names = path.split(".")
            yield from (".".join(names[:end]) for end in range(1, len(names) + 1))
        with suppress(ValueError):
            if (meant := _as_read(value)) != value:
                yield from _module_names(meant)
