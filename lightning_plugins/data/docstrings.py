"""Real text pairs on every machine: docstrings of the running Python's own standard library."""

import ast
import gc
import inspect
import re
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from lightning_plugins.data.text_data import TextData
from lightning_plugins.data.text_pairs import Texts

_NOT_MINED = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_SHARE = 0.1  # of the pairs that test and validation have at least
_WithDocstring = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
# a docstring with a summary, an empty line and more: other files need not be parsed
_CANDIDATE = re.compile(rb"(\"\"\"|''')\s*\S[^\n]*\n[ \t]*\r?\n")


class Docstring(NamedTuple):
    """The text below the summary line, the summary line, and the file with the line where they begin."""

    body: str
    summary: str
    place: str


class PythonDocstrings(TextData):
    """Docstring to summary line: about 2,900 pairs of English from Python's own standard library, without a download.

    The source is what stands below a docstring's summary line, the target the summary line, of every function, class
    and module whose docstring has both. Each source comes once. Texts differ a little between versions of Python; on
    one, they are always the same.

    Modules of the library (``email``, ``turtle``, ...) stay whole, so that the copies and variants inside a module do
    not leak: a tenth of the pairs is for testing, a tenth for validation, whatever the seed.

    Args:
        tokenizer: name of the tokenizer: an id of the Hub, a folder, or package:NAME/FOLDER. Default: the model's, if
            it has one; else a WordPiece tokenizer is learnt from the training texts.
        vocab_size: most tokens of a tokenizer that is learnt.
        lowercase: whether a tokenizer that is learnt folds upper case and strips accents.
        max_source_length: most tokens of a source, with its [CLS] and [SEP]; 3 or more. Half of the
            sources have fewer than 50.
        max_target_length: most tokens of a target, with its [SEP]; 2 or more. All but one in a
            hundred have fewer than 24.
        long_sources: what becomes of a longer source: truncate cuts its end and tells how many were cut; raise is an
            error.
        long_targets: what becomes of a longer target, which is never cut, for a model would learn to stop there: raise
            is an error; drop leaves its pair out of training and tells how many were. In validation and test the pair
            stays, with its text but no target tokens: it counts for what is generated, not for the loss.
        batch_size: pairs in a batch of one process; with packing, rows.
        packing: whether training rows of up to max_source_length + max_target_length tokens hold as many pairs as fit.
        length_grouping: whether pairs of a batch are alike in length, so that little is padding; no effect on packed
            rows.
        num_workers: processes that prepare batches. Texts are encoded once, so that the default 0 is the fastest.
        seed: seed of the order.

    Raises:
        ValueError: an argument is out of range.
        FileNotFoundError: this Python came without the source files of its library (when the data are asked for).
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        vocab_size: int = 8000,
        lowercase: bool = False,
        max_source_length: int = 96,
        max_target_length: int = 32,
        long_sources: Literal["truncate", "raise"] = "truncate",
        long_targets: Literal["raise", "drop"] = "drop",
        batch_size: int = 32,
        packing: bool = False,
        length_grouping: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            tokenizer,
            vocab_size,
            lowercase,
            max_source_length,
            max_target_length,
            long_sources,
            long_targets,
            batch_size,
            packing,
            length_grouping,
            num_workers,
            seed,
        )

    def read(self, split: str) -> Texts | None:
        """One of the three fixed parts; prediction has none of its own."""
        if split == "predict":
            return None
        found = _splits()[split]
        return Texts([pair.body for pair in found], [pair.summary for pair in found], [pair.place for pair in found])


@cache
def _splits() -> dict[str, list[Docstring]]:
    """Modules in the order of a checksum of their names: test until it has its share, validation likewise, train."""
    collecting = gc.isenabled()
    gc.disable()  # trees have no cycles, and looking for some in millions of new nodes takes most of the time
    try:
        modules = mine_docstrings(Path(sysconfig.get_path("stdlib")))
    finally:
        if collecting:
            gc.enable()
    total = sum(map(len, modules.values()))
    if not total:
        raise FileNotFoundError(
            f"PythonDocstrings finds no docstrings in {sysconfig.get_path('stdlib')!r}: this Python came without the "
            "source files of its library. Use another one."
        )
    splits: dict[str, list[Docstring]] = {"test": [], "val": [], "train": []}
    for name in sorted(modules, key=lambda name: zlib.crc32(name.encode())):
        split = next((s for s in ("test", "val") if len(splits[s]) < _SHARE * total), "train")
        splits[split].extend(modules[name])
    return splits


def mine_docstrings(folder: Path) -> dict[str, list[Docstring]]:
    """The docstrings with summary and body below a folder, by the module or package at its top.

    Tests and installed packages are passed over, and so are bodies that came before.

    Args:
        folder: folder of Python files, with those below it.
    """
    modules: dict[str, list[Docstring]] = {}
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder)
        if _NOT_MINED.intersection(inner.parts):
            continue
        for pair in _in_file(path, inner.as_posix()):
            if pair.body not in seen:
                seen.add(pair.body)
                modules.setdefault(inner.parts[0].removesuffix(".py"), []).append(pair)
    return modules


def _in_file(path: Path, name: str) -> Iterator[Docstring]:
    content = path.read_bytes()
    if not _CANDIDATE.search(content):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own, about escapes in strings
        tree = ast.parse(content)
    for node in _documented(tree):
        docstring = ast.get_docstring(node)
        summary, _, rest = (docstring or "").partition("\n")
        body = inspect.cleandoc(rest) if rest.startswith("\n") else ""
        if summary.strip() and body.strip():
            line = node.body[0].lineno
            yield Docstring(body.strip(), summary.strip(), f"{name}, line {line}")


def _documented(node: _WithDocstring) -> Iterator[_WithDocstring]:
    """What may carry a docstring: the module, and classes and functions in one another, not below ``if`` or ``try``."""
    yield node
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _documented(child)
