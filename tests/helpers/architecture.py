"""Bring ``docs/architecture.md`` up to date: the tree with one line a file, and the arrows as a picture.

``python tests/helpers/architecture.py`` writes both; a test insists that the tree is the present one.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_plugins"
PAGE = ROOT / "docs/architecture.md"
PICTURE = ROOT / "docs/images/architecture.png"
BEGIN, END = "<!-- tree -->\n", "<!-- end of tree -->\n"
# From left to right: who may import whom. A box of several rooms stands for each of them.
ROOMS = [("core",), ("data", "optim", "metrics", "replay"), ("capsnet", "eae", "sid", "unilm", "callbacks"), ("cli",)]


def headline(path):
    """The first line of a file's docstring, without its full stop."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0].rstrip(".")


def tree(folder=PACKAGE, indent=""):
    """Lines of a folder: its files, then the folders in it."""
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield f"{indent}{path.name:<{28 - len(indent)}} {headline(path)}"
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        yield f"{indent}{inner.name + '/':<{28 - len(indent)}} {headline(inner / '__init__.py')}"
        yield from tree(inner, indent + "  ")


def page():
    """The page with the present tree."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return before + BEGIN + "```text\n" + "\n".join(tree()) + "\n```\n" + END + after


def arrows():
    """Pairs of rooms of which the first imports from the second, read from the source."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_plugins."):
                found.add((room, node.module.split(".")[1]))
    rooms = {name for column in ROOMS for name in column}
    return {(a, b) for a, b in found if a != b and {a, b} <= rooms}


def draw():
    """Boxes in columns, an arrow from each room to those it imports from."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(-0.6, len(ROOMS) - 0.4)
    axes.set_ylim(-0.4, 4.4)
    at = {
        name: (x, 2 - row + (len(column) - 1) / 2) for x, column in enumerate(ROOMS) for row, name in enumerate(column)
    }
    colors = ["#555555", "#2f6f9f", "#2f8f5f", "#9f5f2f"]
    for (x, y), name in ((place, name) for name, place in at.items()):
        box = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": colors[x], "linewidth": 1.6}
        axes.text(x, y, name, ha="center", va="center", fontsize=12, bbox=box, zorder=3)
    for a, b in sorted(arrows()):
        (x, y), (u, v) = at[a], at[b]
        bend = 0.0 if x - u == 1 else 0.1 if y >= 2 else -0.1
        style = {"arrowstyle": "-|>", "color": colors[x], "alpha": 0.55, "shrinkA": 34, "shrinkB": 36}
        axes.annotate("", (u, v), (x, y), zorder=1, arrowprops=style | {"connectionstyle": f"arc3,rad={bend}"})
    axes.set_title("Who imports from whom: arrows point one way, read from the source", fontsize=11)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    draw()
    sys.exit(0)
