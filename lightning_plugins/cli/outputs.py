"""Where a run has left its pictures, in a few lines."""

import os
from pathlib import Path

MAX_PICTURES = 11


def picture_lines(folder: Path, since: float) -> list[str]:
    """The newest picture of each kind below ``folder``, one line each, with the number of the others.

    Args:
        folder: ``<log_dir>/images``.
        since: seconds since the epoch; older files are another run's.
    """
    kinds: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*.png")):
        if path.stat().st_mtime >= since:
            kinds.setdefault(path.parent, []).append(path)
    lines = [
        shorten(paths[-1]) + (f"  (and {len(paths) - 1} earlier)" if paths[1:] else "") for paths in kinds.values()
    ]
    if len(lines) > MAX_PICTURES:
        lines = [*lines[: MAX_PICTURES - 1], f"and {len(lines) - MAX_PICTURES + 1} more kinds in {shorten(folder)}"]
    return lines


def shorten(path: str | os.PathLike) -> str:
    """The path from the current folder if it lies below it, else as it is."""
    relative = os.path.relpath(path)
    return os.fspath(path) if relative.startswith("..") else relative
