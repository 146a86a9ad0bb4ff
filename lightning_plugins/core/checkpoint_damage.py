"""Whether a checkpoint file is what was written: ``torch.save`` keeps checksums, and ``torch.load`` ignores them."""

import os
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_FOLDER = 0x10  # a bit of an entry's attributes by which torch would read nothing
_JUST_WRITTEN = 2 * 10**9  # ns in which a file may change again with no change of its time: the coarsest clock, of FAT
_verdicts: dict[tuple[tuple[int, ...], ...], str | None] = {}  # of files that this process has read


def damage(path: Path) -> str | None:
    """What is wrong with a local checkpoint file, in words that follow its name; ``None`` if it is whole.

    The checksum (CRC-32) of every record and the headers around them are compared, at about a second for 2 GB. A file
    in torch's old format, or one written under ``torch.serialization.set_crc32_options(False)``, has no checksums.

    """
    return remembered([path], lambda: _read(path))


def remembered(paths: Sequence[Path], judge: Callable[[], str | None]) -> str | None:
    """What ``judge`` says of some files.

    A command asks two or three times for one file: the first answer serves as long as the file has not changed.
    """
    found = [path.stat() for path in paths]
    files = tuple((each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found)
    if files in _verdicts:
        return _verdicts[files]
    settled = time.time_ns() - max(max(each.st_mtime_ns, each.st_ctime_ns) for each in found) > _JUST_WRITTEN
    verdict = judge()
    if settled:
        _verdicts[files] = verdict
    return verdict


def _read(path: Path) -> str | None:
    if path.stat().st_size == 0:
        return "is empty: the run that wrote it was cut off"
    with path.open("rb") as file:
        begins_as_archive = file.read(2) == b"PK"
        try:
            is_archive = zipfile.is_zipfile(file)
            wrong = _wrong_record(file) if is_archive else None
        except Exception as error:  # a wrong header may lead to anything
            return f"is damaged ({' '.join(str(error).split()) or type(error).__name__})"
    if begins_as_archive and not is_archive:
        return "is truncated: the run that wrote it was cut off"
    return f"is damaged (the checksum of {wrong!r} is wrong)" if wrong else None


def _wrong_record(file: Any) -> str | None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if not any(entry.CRC for entry in entries):
            return None
        folders = [entry.filename for entry in entries if entry.is_dir() or entry.external_attr & _FOLDER]
        return folders[0] if folders else archive.testzip()


def refuse_damage(path: Any) -> None:
    """Raise for a damaged local file; an open file, a folder, an address and a missing file are passed over.

    Raises:
        OSError: the file is empty, truncated or damaged.
    """
    if isinstance(path, (str, os.PathLike)) and os.path.isfile(path) and (what := damage(Path(path))):
        raise OSError(f"checkpoint {os.fspath(path)!r} {what}. Use an earlier one.")
