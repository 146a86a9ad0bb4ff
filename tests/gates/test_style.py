"""Ruff over the whole tree, and what a published repository must not contain."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff(command):
    answer = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stdout


def tracked():
    """Our own text files under version control."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    endings = {".py", ".md", ".cfg", ".toml", ".txt", ".yaml", ".json", ""}
    paths = [ROOT / name for name in names if name and Path(name).suffix in endings]
    return [path for path in paths if path.is_file() and path.name != "LICENSE"]


def test_no_file_names_a_place_on_someones_machine():
    places = re.compile(r"(?<![\w.])/(home|root|Users|work|mnt)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if places.search(line) and path != Path(__file__)
    ]
    assert found == []
    assert places.search("see /home/me/x")


def test_every_test_file_has_a_name_of_its_own():
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


WITHOUT_A_PART = {"label_noise.py"}  # about callbacks, which serve every part
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*_*.py") if path.name != "__init__.py")


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short_and_starts_from_main(name):
    text = (ROOT / "recipes" / name).read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) < 150
    assert ast.get_docstring(tree)
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [argument.arg for argument in main.args.args] == ["argv"]
    part = name.split("_")[0]
    assert name in WITHOUT_A_PART or (ROOT / "lightning_plugins" / part).is_dir(), (
        f"{name} does not begin with a part's name"
    )
