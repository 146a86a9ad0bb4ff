"""A folder that is written as a whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to that gets its name when all is written, and is removed after an error.

    Args:
        folder: new, or empty. Until all is written the files lie beside it, in ``<folder>.partial-...``.

    Raises:
        FileExistsError: ``folder`` exists and is not empty.
        OSError: the system could not write it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty: export to a new folder.")
    partial = folder.with_name(f"{folder.name}.partial-{token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()  # empty; not every system renames over it
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or "os error" in str(error):  # as safetensors and tokenizers say it
            raise OSError(f"{folder} cannot be written, and nothing of it was: {_reason(error)}.") from error
        raise


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).rstrip(".")
