"""Markdown tables of anyone's texts, which appear as they are: nothing in them is a column, emphasis, link or HTML."""

import re
from collections.abc import Sequence
from typing import Any

_CONTROL = r"[\x00-\x1f\x7f-\x9f]"
_MARKS = r"([\\`*|\[\]]|(?<![^\W_])_|_(?![^\W_]))"  # an underscore within a word, as in num_classes, marks nothing


def markdown_text(value: Any) -> str:
    r"""A value as Markdown that shows it, in one line.

    >>> print(markdown_text("a|b <script> *x*"))
    a\|b &lt;script> \*x\*
    """
    text = str(value).replace("&", "&amp;").replace("<", "&lt;")
    return "<br>".join(re.sub(_MARKS, r"\\\1", re.sub(_CONTROL, " ", line)) for line in text.splitlines())


def markdown_table(columns: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table with a heading for each column.

    >>> print(markdown_table(["metric", "value"], [["FID", 1.5]]))
    | metric | value |
    | --- | --- |
    | FID | 1.5 |
    """
    lines = [[markdown_text(cell) for cell in line] for line in (columns, *rows)]
    lines.insert(1, ["---"] * len(columns))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
