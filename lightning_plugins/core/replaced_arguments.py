"""Arguments that another one replaces: a learning rate of the paper's optimizer beside an optimizer of the user's."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lightning.pytorch import LightningModule

from lightning_plugins.core.arguments import told
from lightning_plugins.core.hyperparameters import constructor_arguments
from lightning_plugins.core.lightning_internals import given_hyperparameters

# By the arguments that replace, all of them given, those that are then read by nobody.
Replaced = Mapping[tuple[str, ...], tuple[str, ...]]
_loading: ContextVar[bool] = ContextVar("_loading", default=False)


@contextmanager
def loading() -> Iterator[None]:
    """Inside, arguments come from a checkpoint: what it was trained with is not judged."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


def replaced(by: Replaced, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each given argument that nobody would read, with one that replaces it.

    >>> [*replaced({("optimizer",): ("lr", "lr_decay")}, {"optimizer": "SGD", "lr": 0.1})]
    [('lr', 'optimizer')]
    """
    for replacing, names in by.items():
        if all(given.get(name) is not None for name in replacing):
            yield from ((name, replacing[0]) for name in names if name in given)


def refuse_replaced(module: LightningModule, by: Replaced, **replacing: Any) -> None:
    """Refuse arguments that were given and would be read by nobody; call it in the constructor that takes them.

    Given is what differs from its default, or what a subclass takes by ``**kwargs``. An optimizer that is a
    ``functools.partial`` with an argument of the same name says itself what it trains with. The command line asks for
    itself, as it knows what was said.

    Args:
        module: the module being constructed.
        by: what replaces what.
        **replacing: the constructor's own values of what replaces.

    Raises:
        ValueError: one was given.
    """
    if _loading.get() or given_hyperparameters() is not None:
        return
    parameters = inspect.signature(type(module)).parameters
    arguments = constructor_arguments(module)
    given = {name: value for name, value in arguments.items() if not _is_default(value, parameters.get(name))}
    for name, other in replaced(by, given | replacing):
        if name not in getattr(replacing[other], "keywords", {}):
            raise ValueError(
                f"{name}={told(given[name])} was given, but {other}={told(replacing[other])} takes its place: leave "
                f"{name} out, and say it in the {other}, as functools.partial(torch.optim.SGD, lr=0.1) says its rate."
            )


def _is_default(value: Any, parameter: inspect.Parameter | None) -> bool:
    if parameter is None or parameter.kind is parameter.VAR_KEYWORD:
        return False
    value = tuple(value) if isinstance(value, list) else value
    return value is parameter.default or (type(value) in (int, float, tuple) and value == parameter.default)
