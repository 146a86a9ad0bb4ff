"""The arrows between folders, read from the source, and what importing the package costs."""

import ast
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

import lightning_plugins

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_plugins"
# Who may import whom, besides itself: core <- metrics, optim, data, replay <- the parts, callbacks <- names <- cli.
BELOW = {
    "core": set(),
    "metrics": {"core"},
    "optim": {"core"},
    "data": {"core"},
    "replay": {"core"},
    "capsnet": {"core", "metrics"},
    "unilm": {"core", "metrics"},
    "eae": {"core", "metrics"},
    "sid": {"core", "metrics"},
    "callbacks": {"core", "metrics", "replay"},
    "names": set(),  # they are loaded when asked for
}
OF_REPLAY = "lightning_plugins.replay.recorder.is_replaying"  # all that a part may take of replay
LATE = {"transformers", "diffusers", "datasets", "matplotlib"}


class Imports(ast.NodeVisitor):
    """Absolute names a module imports: ``(name, inside a function, for type checkers only)``."""

    def __init__(self, module, is_package):
        self.parts = module.split(".") if is_package else module.split(".")[:-1]
        self.found, self.depth, self.typing = [], 0, False

    def visit(self, node):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        self.depth += function
        super().visit(node)
        self.depth -= function

    def visit_If(self, node):
        outer, self.typing = self.typing, self.typing or ast.unparse(node.test).endswith("TYPE_CHECKING")
        for child in node.body:
            self.visit(child)
        self.typing = outer
        for child in node.orelse:
            self.visit(child)

    def add(self, name):
        self.found.append((name, self.depth > 0, self.typing))

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node):
        base = self.parts[: len(self.parts) - node.level + 1] if node.level else []
        for alias in node.names:
            self.add(".".join([*base, *([node.module] if node.module else []), alias.name]))

    def visit_Call(self, node):
        function = ast.unparse(node.func).split(".")[-1]
        if function in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            self.add(node.args[0].value)
        self.generic_visit(node)


def imports_of(module, source, is_package=False):
    visitor = Imports(module, is_package)
    visitor.visit(ast.parse(source))
    return visitor.found


def folder_of(name):
    """Where in the house a name of this package lives: ``core``, ``capsnet``, ``cli``, ``recipes`` or ``names``."""
    parts = name.split(".")
    if parts[0] in ("recipes", "configs"):
        return parts[0]
    if parts[1:] and parts[1] == "__main__":
        return "cli"
    return "names" if len(parts) == 1 or parts[1].startswith("_") or parts[1] in lightning_plugins._PUBLIC else parts[1]


def may_import(folder, name):
    """Whether a file of the folder may import a dotted name."""
    target = folder_of(name)
    if folder in ("cli", "recipes"):
        return target not in ("configs", "recipes")
    is_part = "metrics" in BELOW[folder] and folder != "callbacks"
    return target == folder or target in BELOW[folder] or (is_part and name == OF_REPLAY)


def problems(module, source, is_package=False):
    """Every breach of the house's rules in one module, in words."""
    folder, found = folder_of(module), []
    near = {"torch", "lightning", "torchmetrics", "lightning_plugins", *sys.stdlib_module_names}
    for name, inside, typing in imports_of(module, source, is_package):
        top = name.split(".")[0]
        if typing:
            continue
        if top in LATE and not inside:
            found.append(f"{module} imports {top} at module level")
        elif folder == "core" and top not in (near | {"numpy", "PIL", "yaml"} | LATE if inside else near):
            found.append(f"{module} imports {top}")
        elif top in ("lightning_plugins", "configs", "recipes"):
            if not may_import(folder, name):
                found.append(f"{module} imports {name}")
            elif folder == "recipes" and any(part.startswith("_") for part in name.split(".")):
                found.append(f"{module} imports {name}, which is not a public name")
    names = [node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    if folder == "callbacks" and any(name.startswith("hparams") for name in names):
        found.append(f"{module} reads a module's hparams")
    return found


def sources():
    paths = [path for folder in ("lightning_plugins", "configs", "recipes") for path in (ROOT / folder).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return sorted(zip(names, paths, strict=True))


@pytest.mark.parametrize(("module", "path"), sources(), ids=[name for name, _ in sources()])
def test_arrows_point_one_way(module, path):
    assert problems(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def test_every_folder_has_its_arrows():
    folders = {folder_of(module) for module, path in sources() if path.is_relative_to(PACKAGE)}
    assert folders == set(BELOW) | {"cli"}


def files_imported(module, path):
    """The files of the package that a file imports anywhere, in functions and for type checkers too."""
    files = {name for name, _ in sources()}
    for name, _, _ in imports_of(module, path.read_text(encoding="utf-8"), path.name == "__init__.py"):
        while name and name not in files:
            name = name.rpartition(".")[0]
        if name and name != module:
            yield name


def circles(graph):
    """Groups of files each of which reaches every other one, by Tarjan's algorithm of networkx."""
    return [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]


def test_no_circle_in_any_folder():
    graph = networkx.DiGraph()
    for module, path in sources():
        if path.name != "__init__.py":  # what stands there are the names for others
            graph.add_edges_from((module, name) for name in files_imported(module, path))
    assert graph.number_of_edges() > 200
    assert circles(graph) == []


def test_a_circle_is_seen():
    graph = networkx.DiGraph([("a.one", "a.two"), ("a.two", "a.three"), ("a.three", "a.one"), ("a.three", "b.four")])
    assert circles(graph) == [["a.one", "a.three", "a.two"]]


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("lightning_plugins.core.logging", "def f():\n    import scipy", "imports scipy"),
        ("lightning_plugins.data.hf", "class A:\n    from datasets import load_dataset", "datasets at module level"),
        ("lightning_plugins.eae.module", "import_module('lightning_plugins.cli')", "imports lightning_plugins.cli"),
        ("lightning_plugins.capsnet.module", "from ..replay import window", "imports lightning_plugins.replay.window"),
        ("lightning_plugins.callbacks.ema", "def f(m):\n    return m.hparams.lr", "reads a module's hparams"),
        ("recipes.two", "from lightning_plugins.capsnet.layers import _mask", "not a public name"),
    ],
)
def test_a_wrong_arrow_is_seen(module, source, words):
    (problem,) = problems(module, source)
    assert words in problem


def loaded_by(code):
    """Names in ``sys.modules`` of a fresh interpreter after ``code``."""
    script = f"import sys\n{code}\nprint(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=600)
    return set(answer.stdout.split())


def test_importing_the_package_imports_none_of_the_heavy_libraries():
    modules = loaded_by("import lightning_plugins; dir(lightning_plugins); lightning_plugins.__version__")
    assert modules & (LATE | {"torch", "lightning", "torchmetrics", "jsonargparse", "numpy"}) == set()
    assert {name for name in modules if name.startswith("lightning_plugins")} == {"lightning_plugins"}


def test_importing_every_public_name_adds_nothing_of_the_late_libraries():
    """torchmetrics itself imports transformers' and matplotlib's shells where installed; ours must add nothing."""
    theirs = "import lightning.pytorch, lightning.pytorch.cli, lightning.pytorch.loggers, torchmetrics.classification"
    names = "; ".join(f"lightning_plugins.{name}" for name in lightning_plugins._PUBLIC)
    added = loaded_by(f"{theirs}\nimport lightning_plugins; {names}") - loaded_by(theirs)
    assert "lightning_plugins.capsnet" in added
    assert {name for name in added if name.split(".")[0] in LATE} == set()


def test_public_names_are_declared_once_and_the_same():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        n.name: f.module
        for f in ast.walk(tree)
        if isinstance(f, ast.ImportFrom) and f.module.startswith("lightning_plugins")
        for n in f.names
    }
    assert typed == lightning_plugins._PUBLIC
    assert lightning_plugins.__all__ == list(lightning_plugins._PUBLIC)
    assert set(lightning_plugins._PUBLIC) <= set(dir(lightning_plugins))


@pytest.mark.parametrize("name", lightning_plugins._PUBLIC)
def test_a_public_name_is_what_configs_record(name):
    """The saved config must say ``lightning_plugins.CapsNet``, not the file the class happens to stand in."""
    from jsonargparse._util import get_import_path

    value = getattr(lightning_plugins, name)
    assert get_import_path(value) == f"lightning_plugins.{name}"
    assert value.__name__ == name


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'CapNet'; its names are EAE, AtomicCheckpointIO"):
        lightning_plugins.CapNet  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'CapNet'"):
        from lightning_plugins import CapNet  # noqa: F401
