"""Private names of Lightning stand in core/lightning_internals.py alone, and each is asked for by a canary test."""

import ast
import importlib
from pathlib import Path

import lightning
import pytest

import lightning_plugins

PACKAGE = Path(lightning_plugins.__file__).parent
INTERNALS = PACKAGE / "core" / "lightning_internals.py"
CANARY = Path(__file__).parents[1] / "core" / "test_lightning_internals.py"
FRAMES = {"_getframe", "currentframe", "f_back", "f_locals"}
# Names that Lightning has too, but that belong to others there, or that only a method can have.
ALLOWED = {
    "callbacks/non_finite_guard/report.py": {"_forward_cache"},  # torchmetrics'
    "callbacks/non_finite_guard/undo.py": {"_computed", "_forward_cache"},  # torchmetrics'
    "replay/writes.py": {"_version"},  # of torch's tensors
    "data/loading.py": {"_iterator"},  # of torch's DataLoader
    "cli/app.py": {  # LightningCLI calls these, and what overrides them
        "_add_subcommands",
        "_parse_ckpt_path",
        "_prepare_subcommand_parser",
        "_run_subcommand",
    },
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names_of_lightning():
    """Every private name that is defined in Lightning's source, and the private keys of its checkpoints."""
    found = {"_class_path", "_instantiator"}
    for folder in ("pytorch", "fabric"):
        for path in (Path(lightning.__file__).parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if is_private(name)}


def own_names(cls):
    """What a class defines or keeps on ``self``."""
    for node in ast.walk(cls):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def uses(source):
    """Private names that a file takes from others: ``thing._name``, ``getattr(thing, "_name")``, imports, and keys."""
    tree = ast.parse(source)
    own = {name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for name in own_names(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if node.attr in FRAMES or (is_private(node.attr) and not (of_self and node.attr in own)):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning."):
            yield from (alias.name for alias in node.names if is_private(alias.name))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and is_private(str(a.value)))
        elif isinstance(node, ast.Constant) and node.value in ("_class_path", "_instantiator"):
            yield node.value


def overridden(module):
    """Private methods by which a class of ours stands in for one of Lightning's."""
    for cls in vars(importlib.import_module(module)).values():
        if isinstance(cls, type) and cls.__module__ == module:
            theirs = [base for base in cls.__mro__ if base.__module__.startswith("lightning.")]
            methods = [name for name, value in vars(cls).items() if callable(value) and is_private(name)]
            yield from (name for name in methods if any(name in vars(base) for base in theirs))


@pytest.fixture(scope="module")
def theirs():
    return names_of_lightning() | FRAMES


def test_lightnings_names_are_found(theirs):
    assert {"_skip_backward", "_MockOptimizer", "_trainer", "_batches_that_stepped"} <= theirs


@pytest.mark.parametrize(
    "source",
    [
        "def f(trainer):\n    return trainer.fit_loop._skip_backward",
        "def f(module):\n    return getattr(module, '_compiler_ctx', None)",
        "from lightning.pytorch.core.optimizer import _MockOptimizer",
        "class A(LightningModule):\n    def f(self):\n        return self._trainer",
        "def f(hparams):\n    return hparams['_class_path']",
        "import sys\nframe = sys._getframe(1)",
    ],
)
def test_a_private_name_is_seen(theirs, source):
    assert theirs.intersection(uses(source))


def test_what_a_class_keeps_itself_is_its_own(theirs):
    source = "class A:\n    def f(self, trainer):\n        self._trainer = trainer\n        return self._trainer"
    assert not theirs.intersection(uses(source))


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path != INTERNALS)


def test_other_files_leave_lightnings_private_names_alone(theirs):
    found = {file: theirs.intersection(uses((PACKAGE / file).read_text(encoding="utf-8"))) for file in FILES}
    for file in FILES:
        if not file.endswith("__main__.py"):
            module = "lightning_plugins." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            found[file].update(overridden(module.removesuffix(".__init__")))
    assert {file: names for file, names in found.items() if names} == ALLOWED


def test_every_private_name_has_its_canary(theirs):
    names = theirs.intersection(uses(INTERNALS.read_text(encoding="utf-8"))) - FRAMES
    assert len(names) > 25
    asked = CANARY.read_text(encoding="utf-8")
    assert {name for name in names if f".{name}" not in asked and f'"{name}"' not in asked} == set()
