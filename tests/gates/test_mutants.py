"""The kept list of wrong products fits the sources, the page its figures, and the runner tells who is noticed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import kept, operators, rates

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "tests/helpers"


def test_every_plausible_mutant_still_has_a_place():
    mutants = kept.plausible(ROOT)  # raises unless its old text stands just once
    assert len(mutants) >= 60
    assert len({(mutant.file, mutant.source) for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        ast.parse(mutant.source)
        assert mutant.source != (ROOT / mutant.file).read_text(encoding="utf-8")
    parts = {mutant.file.split("/")[1] for mutant in mutants}
    assert parts >= {"capsnet", "unilm", "eae", "sid", "callbacks", "core", "metrics", "optim", "data"}
    assert all(entry["why"] for name in ("plausible", "equivalent") for entry in kept.entries(ROOT, f"{name}.yaml"))


def test_equivalent_mutants_change_a_line_that_is_still_there():
    for file, change in kept.equivalent(ROOT):
        lines = {" ".join(line.split()) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()}
        assert change.split(" -> ")[0] in lines or any(change.startswith(f"{line} -> ") for line in lines), change


def test_the_page_is_made_of_the_figures():
    assert (ROOT / "docs/mutants.md").read_text(encoding="utf-8") == rates.page(ROOT)
    assert all((ROOT / file).is_file() for file in rates.load(ROOT))


TOY = """
def double(x):
    return 2 * x


def triple(x):
    return 3 * x


def forever(x):
    while x > 0:
        x -= 1
    return x
"""
TOY_TEST = """
import pytest
from lightning_plugins.part.toy import double, forever, triple


@pytest.fixture(scope="module")
def six():
    return double(3)


def test_double(six):
    assert six == 6


def test_the_rest():
    assert triple(0) == 0
    assert forever(2) == 0
"""
TOY_LIST = """
- {file: part/toy.py, old: 2 * x, new: 2 + x, why: seen through a fixture of several tests}
- {file: part/toy.py, old: 3 * x, new: 2 * x, why: nobody sees it}
"""


def test_the_runner_tells_who_is_noticed(tmp_path):
    files = {
        "lightning_plugins/__init__.py": "",
        "lightning_plugins/part/__init__.py": "",
        "lightning_plugins/part/toy.py": TOY,
        "tests/part/test_toy.py": TOY_TEST,
        "tests/part/test_other.py": "def test_other():\n    assert False\n",
        "tests/helpers/mutants/plausible.yaml": TOY_LIST,
        "setup.cfg": "[tool:pytest]\naddopts = --doctest-modules --import-mode=importlib\n",
        "docs/x.md": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    answer = subprocess.run(
        [sys.executable, "-m", "mutants", "--root", ".", "--write"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(HELPERS), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    first, *verdicts, last = answer.stdout.splitlines()
    assert first.startswith("2 tests, unchanged"), answer.stdout + answer.stderr
    assert ["killed by tests/part/test_toy.py::test_double" in verdicts[0], ": survived (" in verdicts[1]] == [True] * 2
    assert last == "lightning_plugins/part/toy.py: 1 of 2 plausible mutants killed"
    assert answer.returncode == 1
    assert (tmp_path / "lightning_plugins/part/toy.py").read_text() == TOY
    assert "| `part/toy.py` | | | 1 of 2 | 50.0 |" in (tmp_path / "docs/mutants.md").read_text()


def test_random_mutants_are_the_same_each_time_and_change_what_runs():
    pytest.importorskip("cosmic_ray")
    source = (ROOT / "lightning_plugins/sid/guidance.py").read_text(encoding="utf-8")
    mutants = operators.sample("x.py", source, 40)
    assert mutants == operators.sample("x.py", source, 40)
    assert len({mutant.source for mutant in mutants}) == len(mutants) >= 30
    docstring = ast.get_docstring(ast.parse(source))
    for mutant in mutants:
        assert ast.get_docstring(ast.parse(mutant.source)) == docstring
        assert mutant.source.splitlines()[: mutant.line - 1] == source.splitlines()[: mutant.line - 1]
