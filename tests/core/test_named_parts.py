"""What a file may name: parts of models that are imported, found without an import."""

import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

from lightning_plugins.core.named_parts import check_named_parts, imported_object, nothing_imported_for


class Parent:
    """Hands its arguments on."""

    def __init__(self, optimizer: OptimizerCallable | None = None, scheduler: LRSchedulerCallable | None = None):
        pass


class Model(Parent):
    """Takes arguments of many kinds."""

    def __init__(
        self,
        name: str = "",
        kind: Literal["os.system"] | None = None,
        activation: Callable | None = None,
        either: str | Callable = "",
        layer: type[nn.Module] = nn.Identity,
        layers: list[nn.Module] | None = None,
        anything: Any = None,
        untyped=None,
        table: dict[str, Any] | None = None,
        **kwargs,
    ):
        pass


def own_part():
    """A function of the model's own package."""


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A module in the current folder that nothing has imported."""
    (tmp_path / "beside_here.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "os.system", "kind": "os.system", "untyped": "os.system", "anything": "os.system"},
        {"activation": "torch.nn.functional.gelu", "either": "torch.nn.functional.relu"},
        {"activation": f"{__name__}.own_part", "layer": f"{__name__}.Model"},
        {"either": "beside_here.v2"},  # a text, for all that is known
        {"layer": "torch.nn.Linear", "layers": [{"class_path": "torch.nn.Linear", "init_args": {"in_features": 2}}]},
        {"optimizer": "torch.optim.SGD", "scheduler": {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau"}},
        {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}, "anything": {"a": [1, {"b": None}]}},
        {"activation": "torch.float32"},  # nothing that could be run
        {"name": "{class_path: os.system}", "untyped": "Note: a text", "anything": ["a, b", "[x", "https://x.org"]},
        {"optimizer": "{class_path: torch.optim.SGD, init_args: {lr: 0.1}}", "untyped": __file__},
    ],
)
def test_right_names_pass(arguments):
    check_named_parts(arguments, Model)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"optimizer": "beside_here.make"}, "its optimizer names 'beside_here.make', which is not imported"),
        ({"layers": ["beside_here.Layer"]}, "its layers names 'beside_here.Layer', which is not imported"),
        ({"activation": "os.system"}, "its activation names 'os.system', which is no part of a model"),
        ({"activation": "torch.hub.load"}, "names 'torch.hub.load', which is no part"),
        ({"activation": "torch.nn.functional.torch.hub.load"}, "which is no part"),
        ({"either": "os.system"}, "its either names 'os.system'"),
        ({"scheduler": "builtins.exec"}, "its scheduler names 'builtins.exec'"),
        ({"anything": {"class_path": "subprocess.Popen"}}, "its anything names 'subprocess.Popen'"),
        ({"anything": [{"x": {"class_path": "subprocess.Popen"}}]}, "its anything names 'subprocess.Popen'"),
        ({"untyped": {"class_path": "beside_here.X"}}, "its untyped names 'beside_here.X', which is not imported"),
        ({"anything": {"class_path": 7}}, "its anything names 7"),
        ({"table": {"class_path": "os.system"}}, "its table names 'os.system'"),
        ({"anything": {"class_path": f"{__name__}.own_part"}}, "own_part', which is no part"),  # it would be called
        (
            {"layers": [{"class_path": "torch.nn.Sequential", "init_args": {"args": {"class_path": "os.popen"}}}]},
            "its layers.args names 'os.popen'",
        ),
        (
            {"layers": [{"class_path": f"{__name__}.Model", "init_args": {"activation": "os.system"}}]},
            "its layers.activation names 'os.system'",
        ),
        (
            {"optimizer": '{"class_path": "beside_here.X"}'},
            "its optimizer names 'beside_here.X', which is not imported",
        ),
        ({"optimizer": " 'beside_here.make'\n"}, "its optimizer names 'beside_here.make', which is not imported"),
        ({"optimizer": r'"\u0062eside_here.make"'}, "its optimizer names 'beside_here.make', which is not imported"),
        ({"optimizer": r'"beside_here\u002emake"'}, "its optimizer names 'beside_here.make', which is not imported"),
        ({"table": {"x": r'{"class_path": "\u0062eside_here.X"}'}}, "its table names 'beside_here.X'"),
        ({"untyped": "{class_path: os.system, day: 2020-99-99}"}, "its untyped names 'os.system'"),  # no date
        ({"untyped": "&a {class_path: os.system, me: *a}"}, "settings that hold themselves"),
        ({"anything": "<<: {class_path: os.system}"}, "its anything names 'os.system'"),
        ({"layers": [{"class_path": "torch.nn.ReLU", "init_args": "{x: {class_path: os.popen}}"}]}, "layers.x names"),
        ({"layers": [{"class_path": "torch.nn.ReLU", "init_args": "evil.yaml"}]}, "init_args that are no settings"),
        ({"optimizer": {"class_path": '"beside_here\\u002eX"'}}, "which is not imported"),
        ({"optimizer": __file__}, "a file that would be read as settings"),
        ({"optimizer": "memory://evil.yaml"}, "a file that would be read as settings"),
        ({"layer": "file:///tmp/evil.yaml"}, "a file that would be read as settings"),
        ({"optimizer.class_path": "subprocess.Popen"}, "its optimizer.class_path is no argument's name"),
        ({"class_path": "os.system"}, "its class_path names 'os.system'"),
        ({"new": {"dict_kwargs": {"a": {"class_path": "os.system"}}}}, "its new.a names 'os.system'"),
    ],
)
def test_wrong_names_are_told(beside, arguments, told):
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        check_named_parts(arguments, Model)
    assert "beside_here" not in sys.modules


@pytest.mark.parametrize("given", ["os.system", os.system, ["os.system"], {"class_path": "os.system", "init_args": {}}])
def test_what_the_user_names_may_be_named(given):
    check_named_parts({"activation": "posix.system" if callable(given) else "os.system"}, Model, {"activation": given})
    for other in ({"either": given}, {"activation": "os.popen"}, None):
        with pytest.raises(ValueError, match="no part of a model"):
            check_named_parts({"activation": "os.system"}, Model, other)


def test_objects_are_found_where_they_are_imported():
    assert imported_object("torch.optim.SGD") is torch.optim.SGD
    assert imported_object("lightning_plugins.CapsNet").__name__ == "CapsNet"
    for path in ("nodots", "", "..", "torch.optim.", "torch.optim.Missing", "missing.module.Name"):
        with pytest.raises(LookupError):
            imported_object(path)


@pytest.mark.parametrize("name", ["beside_here.make", "x: [' beside_here.make']", r'"\u0062eside_here.make"'])
def test_the_lock_behind_the_checks(beside, name):
    with nothing_imported_for({"a": [name, {"b": "torch.optim.SGD"}]}):
        with pytest.raises(ModuleNotFoundError, match="'beside_here' is not imported"):
            __import__("beside_here")
        import torch.optim  # noqa: F401
    with pytest.raises(SystemExit, match="imported"):
        __import__("beside_here")
