"""docs/architecture.md says what is there: the tree of files, and the names along its walks."""

import importlib
import re
from functools import reduce

import architecture
import pytest

PAGE = architecture.PAGE.read_text(encoding="utf-8")
PLACES = re.findall(r"`(\w+(?:/\w+)*)\.py`\s+`([\w.]+)`", PAGE)


def test_the_tree_is_the_present_one():
    assert architecture.page() == PAGE, "run: python tests/helpers/architecture.py"


def test_every_file_says_what_it_is():
    lines = [line.split(maxsplit=1) for line in architecture.tree()]
    assert [line[0] for line in lines if len(line) < 2] == []


@pytest.mark.parametrize(("file", "name"), PLACES, ids=[f"{file}:{name}" for file, name in PLACES])
def test_a_walk_names_what_is_there(file, name):
    module = importlib.import_module("lightning_plugins." + file.replace("/", "."))
    assert reduce(getattr, name.split("."), module)


def test_there_are_three_walks():
    assert len(PLACES) >= 15
