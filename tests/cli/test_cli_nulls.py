"""null in a config, for arguments of every kind."""

from typing import Any, Literal

import pytest
import torch
from jsonargparse import Namespace

from lightning_plugins.cli.messages import UsageError
from lightning_plugins.cli.passed_over import refuse_nulls


class Part:
    """Takes null for some of its arguments."""

    def __init__(
        self,
        mode: Literal["a", None] = "a",
        thing: object = 1,
        anything: Any = 1,
        either: int | None = 1,
        count: int = 1,
        kind: Literal["a"] = "a",
    ):
        pass


def make(either: int | None = 1, count: int = 1) -> torch.nn.Module:
    """A function in the place of a class."""
    return torch.nn.Identity()


def refuse(part, **arguments):
    """Ask it of a part of a config."""
    path = f"{__name__}.{part.__name__}"
    refuse_nulls(Namespace(model=Namespace(class_path=path, init_args=Namespace(**arguments))), ())


def test_null_where_it_is_taken():
    refuse(Part, mode=None, thing=None, anything=None, either=None, count=2, kind="a")
    refuse(make, either=None, count=2)


@pytest.mark.parametrize(("part", "name"), [(Part, "count"), (Part, "kind"), (make, "count")])
def test_null_where_it_is_not(part, name):
    with pytest.raises(UsageError, match=f"model.{name} takes .*, not null"):
        refuse(part, **{name: None})
