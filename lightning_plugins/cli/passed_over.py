"""What the parser lets pass without a word: keys without a value below them, null, and seeds that are none."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace

from lightning_plugins.cli.explain import argument_names, import_object, unknown_key
from lightning_plugins.cli.messages import UsageError

_OF_CLASSES = {"class_path", "init_args", "dict_kwargs"}
_LARGEST_SEED = 2**32 - 1  # numpy's


def refuse_unknown_keys(file: Path, parsed: Namespace, parser: ArgumentParser) -> None:
    """Refuse unknown keys of a config that hold nothing but empty mappings, which the parser drops unread.

    Args:
        file: the config, in YAML.
        parsed: what the parser has made of it, together with what was given before.
        parser: of the sub-command.

    Raises:
        UsageError: such a key is known neither to the parser nor to the class it is given to.
    """
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    options = [action.dest for action in parser._actions if not action.dest.endswith(".help")]
    unknown = next(_unknown_options(given, options, parsed), None)
    if unknown is not None:
        raise unknown_key(unknown.key, unknown.class_path, parser)


class _Unknown(NamedTuple):
    key: str  # dotted, as on the command line
    class_path: str = ""  # of the class whose argument it was meant to be


def _unknown_options(given: Any, known: Sequence[str], parsed: Namespace, above: str = "") -> Iterator[_Unknown]:
    """Keys at the top and in groups such as ``trainer``, and what stands below the others."""
    for key, value in given.items() if isinstance(given, Mapping) else ():
        name = f"{above}{key}"
        if any(option.startswith(f"{name}.") for option in known):
            yield from _unknown_options(value, known, parsed, f"{name}.")
        elif name in known:
            yield from _unknown_arguments(value, parsed.get(name), name)
        elif _is_hollow(value):
            yield _Unknown(name)


def _unknown_arguments(given: Any, parsed: Any, name: str) -> Iterator[_Unknown]:
    """Keys beside ``init_args`` and in them, of a class or of several."""
    if isinstance(given, list) and isinstance(parsed, list):
        for item, known in zip(given, parsed, strict=False):
            yield from _unknown_arguments(item, known, name)
    if not isinstance(given, Mapping) or isinstance(parsed, dict):  # a dict is an argument that may hold anything
        return
    for key in given.keys() - _OF_CLASSES if _is_hollow(given) else ():
        yield _Unknown(f"{name}.{key}")
    arguments = given.get("init_args")
    if isinstance(arguments, Mapping) and isinstance(parsed, Namespace):
        known = argument_names(parsed.class_path)
        for key, value in arguments.items():
            if key not in known and _is_hollow(value):
                yield _Unknown(f"{name}.{key}", parsed.class_path)
            yield from _unknown_arguments(value, parsed.get(f"init_args.{key}"), f"{name}.{key}")


def _is_hollow(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_hollow, value.values()))


def refuse_nulls(config: Namespace, linked: Sequence[str]) -> None:
    """Refuse null for arguments of model and data that take none.

    Args:
        config: of the sub-command.
        linked: arguments that have their values from elsewhere.

    Raises:
        UsageError: there is one.
    """
    for key in ("model", "data"):
        part = config.get(key)
        if part is None or not part.get("init_args"):
            continue
        parser = ArgumentParser(exit_on_error=False)
        made = import_object(part.class_path)  # a class, or a function that returns its object
        add = parser.add_class_arguments if isinstance(made, type) else parser.add_function_arguments
        add(made, fail_untyped=False)
        for action in parser._actions:
            kind = getattr(action, "_typehint", action.type)
            if action.dest in linked or action.default is None or kind in (None, Any, object):
                continue
            if part.init_args.get(action.dest, "") is None and not {None, type(None)} & {*get_args(kind)}:
                raise UsageError(
                    f"{key}.{action.dest} takes {getattr(kind, '__name__', kind)}, not null.",
                    f"Leave it out for its default, {action.default!r}.",
                )


def refuse_seed(seed: Any) -> None:
    """Refuse a seed that no generator takes.

    Raises:
        UsageError: so.
    """
    if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed <= _LARGEST_SEED:
        raise UsageError(f"seed_everything takes a whole number from 0 to {_LARGEST_SEED}, or true/false, not {seed}.")
