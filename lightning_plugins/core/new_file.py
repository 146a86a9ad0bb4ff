"""A file that is written as a whole or not at all, and never through a link that lies under its name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lightning_plugins.core.replacing import replacing


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes its name when all is written: a reader sees the whole of it or what was there.

    Args:
        path: of the file. What is there is replaced; if that is a link, the link is, not the file that it points to.
            Its folder is made if missing.

    Raises:
        OSError: the system could not write it; nothing of it is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("xb") as file:  # "x": nobody can have put a link under its name
        yield file
