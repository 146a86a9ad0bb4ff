"""Mistakes told in at most five lines, with the closest valid names. Imports nothing heavy."""

import difflib
import errno
import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import lightning_plugins

MAX_LINES = 5
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class UsageError(Exception):
    """A mistake in what the user typed: one sentence, then hints.

    Args:
        sentence: what is wrong, with the name and the value.
        hints: further lines; empty ones are dropped.
    """

    status = 2

    def __init__(self, sentence: str, *hints: str) -> None:
        super().__init__(sentence)
        self.lines = [line for line in (*sentence.splitlines(), *hints) if line.strip()]

    def exit(self) -> NoReturn:
        """Leave with the status after printing at most five lines to stderr."""
        sys.stderr.write("error: " + "\n".join(map(harmless, self.lines[:MAX_LINES])) + "\n")
        sys.exit(self.status)


class RunStoppedError(UsageError):
    """What stopped a run from outside: a full disk, a loader's process that was killed."""

    status = 1


def harmless(text: str) -> str:
    r"""A line in which nothing steers the terminal: what is not printable stands there as Python writes it.

    >>> harmless("\x1b[31mred")
    '\\x1b[31mred'
    """
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def raised_here(error: Exception) -> bool:
    """Whether the error was raised by this package's own code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return last.filename.startswith(str(Path(lightning_plugins.__file__).parent))


_TOLD = r"^(?:\w+\.)*(ValueError|File\w+Error|OSError|FloatingPointError|MisconfigurationException): (.+)\Z"


def said_by_process(text: str) -> UsageError | None:
    """What this package's code or Lightning's rules said in a process of the run, from that process's traceback.

    ``None`` for any other error, whose traceback is needed.
    """
    files = re.findall(r'^ *File "(.+)", line \d+', text, re.MULTILINE)
    told = re.search(_TOLD, text, re.MULTILINE | re.DOTALL)
    ours = files and files[-1].startswith(str(Path(lightning_plugins.__file__).parent))
    if told is None or not (ours or told[1] == "MisconfigurationException"):
        return None
    kind = RunStoppedError if told[1] == "FloatingPointError" else UsageError  # the former is no mistake of the words
    return kind(told[2].strip())


def outside_cause(error: BaseException) -> str:
    """One sentence for a disk that takes no more or a process of the run that was killed; empty for any other error.

    >>> outside_cause(OSError(errno.ENOSPC, "No space left on device", "metrics.csv"))
    "'metrics.csv' cannot be written: No space left on device."
    """
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return f"a worker process of the data loader is gone: {str(error).splitlines()[0].strip().rstrip('.')}."
    if isinstance(error, RuntimeError) and (words := re.search(r"Connection (closed|reset) by peer", str(error))):
        return f"another process of the run is gone: {words[0]}."
    for cause in (error, error.__cause__):
        if isinstance(cause, OSError) and cause.errno in _FULL:
            if cause is not error and isinstance(error, OSError):
                return str(error)  # it tells the file
            name = repr(cause.filename) if cause.filename else "a file of the run"
            return f"{name} cannot be written: {cause.strerror}."
    return ""


def closest(word: str, names: Iterable[str]) -> list[str]:
    """The names close to ``word``: three at most, and none much farther than the closest.

    >>> closest("max_epoch", ["max_epochs", "min_epochs", "max_steps", "devices"])
    ['max_epochs']
    """
    close = difflib.get_close_matches(word, list(names), n=3, cutoff=0.7)
    distance = [1 - difflib.SequenceMatcher(None, name, word).ratio() for name in close]
    return [name for name, far in zip(close, distance, strict=True) if far < distance[0] + 0.1]


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """A question with the names close to ``word``, or nothing.

    >>> did_you_mean("capsnet/digts", ["capsnet/digits", "eae/faces"])
    'Did you mean capsnet/digits?'
    """
    close = closest(word, names)
    return f"Did you mean {join_or(close)}?" if close else ""


def join_or(names: Iterable[str]) -> str:
    """``a, b or c``.

    >>> join_or(["a", "b", "c"])
    'a, b or c'
    """
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
