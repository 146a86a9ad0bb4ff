"""Rows of text files: JSON lines, tables and plain text, plain or compressed, with errors that name file and line."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ENDINGS = (".jsonl", ".tsv", ".csv", ".txt")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # spreadsheets write it before the first column's name


class Row(NamedTuple):
    """One row: its values by column, and where it stands, for sentences (``"train.jsonl, line 17"``)."""

    values: dict[str, Any]
    place: str


def read_rows(file: str | Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    r"""The rows of a text file in UTF-8, in order.

    - ``.jsonl``: an object a line; empty lines are passed over.
    - ``.tsv``: fields between tabs, quotation marks are text. ``.csv``: fields between commas, a field with commas,
      line ends or doubled quotation marks is quoted. The first line names the columns.
    - ``.txt``: documents with an empty line between them; their only column is ``text``.

    Args:
        file: path with one of these endings, or with one of them and ``.gz``.
        columns: names for the columns of a table whose first line does not name them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, ``columns`` for a file that is no table, or what stands in a line cannot be read.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "pairs.tsv")
        ...     _ = path.write_text("source\ttarget\n1 2\t2 1\n", encoding="utf-8")
        ...     [row.values for row in read_rows(path)]
        [{'source': '1 2', 'target': '2 1'}]
    """
    path = Path(file).expanduser()
    ending = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if ending not in ENDINGS:
        raise ValueError(f"{path} has none of the endings {', '.join(ENDINGS)} (each may be followed by .gz).")
    if columns is not None and ending not in (".tsv", ".csv"):
        raise ValueError(f"columns={list(columns)} names the columns of a .tsv or .csv file, which {path} is not.")
    if not path.is_file():
        raise FileNotFoundError(f"The file {str(path)!r} does not exist.")
    lines = _Lines(path)
    if ending == ".jsonl":
        yield from _objects(lines)
    elif ending == ".txt":
        yield from _documents(lines)
    else:
        yield from _table(lines, ending, columns)


class _Lines:
    """Decoded lines without their ends; ``place`` says where the last one stands."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0

    @property
    def place(self) -> str:
        return self.at(self.number)

    def at(self, number: int) -> str:
        return f"{self.path}, line {number}"

    def __iter__(self) -> Iterator[str]:
        for content in self._bytes():
            self.number += 1
            if self.number == 1:
                content = content.removeprefix(_BYTE_ORDER_MARK)
            try:
                yield content.rstrip(b"\r\n").decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.place}, is not UTF-8: byte {content[error.start]:#04x} at place {error.start}. "
                    "Convert the file to UTF-8."
                ) from error

    def _bytes(self) -> Iterator[bytes]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        try:
            with opener(self.path, "rb") as file:
                yield from file
        except gzip.BadGzipFile as error:
            raise ValueError(f"{self.path} is no gzip file; if it is not compressed, drop the .gz.") from error
        except (EOFError, zlib.error) as error:
            raise ValueError(f"{self.place}: the file is truncated or damaged after it.") from error


def _objects(lines: _Lines) -> Iterator[Row]:
    for line in lines:
        if not line.strip():
            continue
        try:
            values = json.loads(line, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"{lines.place}, is not JSON: {error.msg} at column {error.colno}.") from error
        except RecursionError as error:
            raise ValueError(f"{lines.place}, is nested too deeply to be read: flatten it.") from error
        except ValueError as error:  # a constant, or more digits of a number than Python reads
            reason = str(error).split(";")[0].rstrip(".")
            raise ValueError(f"{lines.place}, cannot be read: {reason}. Write it as a text.") from error
        if not isinstance(values, dict):
            raise ValueError(
                f'{lines.place}, must be an object such as {{"source": ..., "target": ...}}, not {line[:40]!r}.'
            )
        yield Row(values, lines.place)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON")


def _documents(lines: _Lines) -> Iterator[Row]:
    document: list[str] = []
    start = 1
    for line in lines:
        if line.strip():
            document.append(line)
            continue
        if document:
            yield Row({"text": "\n".join(document)}, lines.at(start))
        document, start = [], lines.number + 1
    if document:
        yield Row({"text": "\n".join(document)}, lines.at(start))


def _table(lines: _Lines, ending: str, columns: Sequence[str] | None) -> Iterator[Row]:
    names = None if columns is None else _distinct(columns, f"columns={list(columns)}")
    for fields in _split(lines, ending):
        if not fields or fields == [""]:
            continue  # an empty line
        if names is None:
            names = _distinct(fields, lines.place)
        elif columns is not None and fields == names:
            raise ValueError(f"{lines.place}, names the columns already: leave out columns={names}.")
        elif len(fields) != len(names):
            raise ValueError(
                f"{lines.place}, has {len(fields)} fields, but there are {len(names)} columns: {', '.join(names)}."
            )
        else:
            yield Row(dict(zip(names, fields, strict=True)), lines.place)


def _distinct(names: Sequence[str], place: str) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"{place}: two columns have the same name: {', '.join(names)}.")
    return list(names)


def _split(lines: _Lines, ending: str) -> Iterator[list[str]]:
    if ending == ".tsv":
        yield from (line.split("\t") for line in lines)
        return
    csv.field_size_limit(2**31 - 1)  # a document may be longer than csv's 131,072 characters
    try:
        yield from csv.reader((line + "\n" for line in lines), strict=True)
    except csv.Error as error:
        raise ValueError(f"{lines.place}, is not CSV: {error}.") from error
