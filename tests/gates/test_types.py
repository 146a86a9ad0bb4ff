"""The typed page of a user has every public name; ``make types`` checks it and the package."""

import ast
from pathlib import Path

import lightning_plugins

PAGE = Path(__file__).parents[1] / "helpers/typed_user.py"


def test_every_public_name_is_on_the_typed_page():
    tree = ast.parse(PAGE.read_text(encoding="utf-8"))
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert set(lightning_plugins.__all__) <= used
