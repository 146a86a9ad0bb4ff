"""A file or folder is written beside its place and put there in one step: a reader finds the old or the new one."""

import ctypes
import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex

_NUMBERED = Path("/proc/self/ns/pid")  # containers with one host's name number their processes each for itself
_HOST = re.sub(r"[^\w.]", "_", socket.gethostname())[:60]
_HOST += f".{_NUMBERED.stat().st_ino}" if _NUMBERED.exists() else ""
_NAME = re.compile(r"\.saving-(?P<host>[\w.]*)-(?P<pid>\d+)-[0-9a-f]{8}")
_FORGOTTEN = 24 * 3600  # seconds after which a file of another machine is taken for a leftover
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
_SHARDED = (".metadata", "meta.pt")  # what a checkpoint that is a folder has
_FLUSHES_NO_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS)  # so say some network file systems
_writing: set[str] = set()  # names that this process has in use


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to; what lies there afterwards is on the disk, and takes its place in one step.

    After an error nothing is left of it, and ``target`` is as it was. The name is hidden, tells host and process, and
    ends in no suffix. What processes that are gone have left in the folder is removed first.
    """
    remove_leftovers(target.parent)
    partial = target.with_name(_hidden_name())
    _writing.add(partial.name)
    try:
        yield partial
        put(partial, target)
    except BaseException:
        _remove(partial)
        raise
    finally:
        _writing.discard(partial.name)


def _hidden_name() -> str:
    return f".saving-{_HOST}-{os.getpid()}-{token_hex(4)}"


def put(source: Path, target: Path) -> None:
    """Flush ``source`` to the disk and give it the name ``target``, over what has it; both lie in the same folder.

    Raises:
        IsADirectoryError: a file would take the place of a folder that is neither empty nor a checkpoint.
    """
    if not _is_folder(source) and _is_folder(target) and _holds_other_files(target):
        raise IsADirectoryError(errno.EISDIR, "it is a folder with other files", str(target))
    for path in [*source.rglob("*"), source] if source.is_dir() else [source]:
        _flush(path)
    if _is_folder(source) or _is_folder(target):
        _replace_folder(source, target)
    else:
        os.replace(source, target)
    _flush(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what interrupted processes were writing into the folder."""
    for path in folder.glob(".saving-*"):
        if (name := _NAME.fullmatch(path.name)) and _is_leftover(path, name["host"], int(name["pid"])):
            _remove(path)


def write_error(error: BaseException, path: object) -> OSError:
    """One sentence for a checkpoint that could not be written."""
    for failure, _ in getattr(error, "failures", {}).values():  # of some processes, gathered by torch
        error = failure
    error = error.__cause__ if isinstance(error.__cause__, OSError) else error
    reason = getattr(error, "strerror", None) or str(error)
    return OSError(f"checkpoint {str(path)!r} cannot be written: {reason}. What had its name before is as it was.")


def is_address(path: object) -> bool:
    """Whether a path leads to another machine, as ``s3://bucket/file`` does."""
    return "://" in str(path)


def is_sharded(path: object) -> bool:
    """Whether a path is a folder in which each process of a run has written its part of a checkpoint."""
    return isinstance(path, (str, os.PathLike)) and os.path.lexists(os.path.join(os.fspath(path), _SHARDED[0]))


def _is_leftover(path: Path, host: str, pid: int) -> bool:
    if host == _HOST and pid == os.getpid():
        return path.name not in _writing  # of a process that had the same number
    if host == _HOST and not _is_alive(pid):
        return True
    try:
        return time.time() - path.stat().st_mtime > _FORGOTTEN
    except FileNotFoundError:  # it has just got its name
        return False


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # there it would be Ctrl-C; what is left goes by its age
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _holds_other_files(folder: Path) -> bool:
    return any(folder.iterdir()) and not any((folder / name).exists() for name in _SHARDED)


def _replace_folder(source: Path, target: Path) -> None:
    """No system replaces a folder that is not empty, but Linux exchanges two names in one step on local disks.

    Elsewhere the old one is called ``<name>.old`` for a moment: killed then, a process leaves it whole, to be found.
    If something has that name already, it stays, and the old one is hidden.
    """
    old = target.with_name(f"{target.name}.old")
    if os.path.lexists(old):
        old = target.with_name(_hidden_name())
    if os.path.lexists(target):
        if _exchange(source, target):
            return _remove(source)
        target.rename(old)
        source.rename(target)
        return _remove(old)
    source.rename(target)


def _exchange(source: Path, target: Path) -> bool:
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here = -100  # AT_FDCWD
    return rename is not None and rename(here, os.fsencode(source), here, os.fsencode(target), _EXCHANGE) == 0


def _remove(path: Path) -> None:
    if _is_folder(path):
        shutil.rmtree(path, ignore_errors=True)  # another process may be at it, too
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # only POSIX opens folders
    number = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)  # Windows flushes for writers only
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in _FLUSHES_NO_FOLDERS:
            raise
    finally:
        os.close(number)
