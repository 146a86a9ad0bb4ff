"""Arguments that an optimizer or a scheduler takes the place of: refused, or told where they stand in a config."""

from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import Namespace

from lightning_plugins.cli.checkpoint import plain, tell
from lightning_plugins.cli.explain import argument_names, import_object
from lightning_plugins.cli.messages import UsageError
from lightning_plugins.core.hyperparameters import argument_defaults
from lightning_plugins.core.replaced_arguments import replaced


def refuse_replaced(explicit: Namespace | None, words: Sequence[str]) -> None:
    """Refuse arguments of the paper's optimizer beside another optimizer, which would not read them.

    Those of a config are told on stderr where the other optimizer has a rate of its own, so that a shipped config
    serves it, too. A value equal to its default counts as none: saved configs hold all of them.

    Args:
        explicit: the model entry with only what the user gave, by flag or config.
        words: what the user typed.

    Raises:
        UsageError: such an argument was typed, or would be lost without a word in its place.
    """
    if explicit is None or "init_args" not in explicit:
        return
    cls, given = import_object(explicit.class_path), explicit.init_args
    if not isinstance(by := getattr(cls, "replaced_by", None), Mapping):
        return
    defaults = argument_defaults(cls)
    given = {name: given[name] for name in defaults if name in given and plain(given[name]) != plain(defaults[name])}
    unread: dict[str, str] = {}
    for name, other in replaced(by, given):
        own = given[other].get("init_args") or {}
        typed = any(word.split("=")[0] in (f"--model.{name}", f"--model.init_args.{name}") for word in words)
        if typed or (other != "scheduler" and "lr" not in own):
            raise _refusal(name, given[name], other, given[other].class_path, defaults[name])
        unread[f"model.{name}"] = f"model.{other}"
    if unread:
        others = " and ".join(dict.fromkeys(unread.values()))
        tell([f"Not read of the config: {', '.join(unread)}. {others} stands in their place."])


def _refusal(name: str, value: Any, other: str, class_path: str, default: Any) -> UsageError:
    own = "lr" if name.endswith("lr") else name
    takes = other != "scheduler" and own in argument_names(class_path)
    return UsageError(
        f"model.{name} {plain(value)!r} was given, but model.{other} {class_path.rpartition('.')[2]} takes its place.",
        f"Say it there: --model.{other}.{own} {plain(value)}" if takes else "",
        f"Leave model.{name} out; if it stands in a config, give its default: "
        f"--model.{name} {'null' if default is None else default}",
    )
