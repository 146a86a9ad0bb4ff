"""What takes a name over: files and folders of others stay, and file systems of few abilities will do."""

import errno
import os
import stat

import pytest

from lightning_plugins.core import replacing
from lightning_plugins.core.new_file import new_file


def put(target, content="new"):
    """A file of this content, or a folder with it."""
    with replacing.replacing(target) as partial:
        if content == "folder":
            partial.mkdir()
            (partial / "meta.pt").write_text("new")
        else:
            partial.write_text(content)


def test_a_folder_with_other_files_stays(tmp_path):
    target = tmp_path / "results"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(IsADirectoryError, match="it is a folder with other files"):
        put(target)
    with pytest.raises(IsADirectoryError), new_file(target) as file:
        file.write(b"new")
    assert sorted(tmp_path.rglob("*")) == [target, target / "thesis.txt"]


@pytest.mark.parametrize("name", [None, ".metadata", "meta.pt"])
def test_an_empty_folder_and_a_checkpoint_are_replaced(tmp_path, name):
    target = tmp_path / "last.ckpt"
    target.mkdir()
    if name:
        (target / name).write_text("old")
    put(target)
    assert target.read_text() == "new" and [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("kept", [True, False])
def test_without_an_exchange_of_names(tmp_path, monkeypatch, kept):
    """What the user calls .old stays his."""
    monkeypatch.setattr(replacing, "_exchange", lambda *names: False)
    target, old = tmp_path / "last.ckpt", tmp_path / "last.ckpt.old"
    put(target, "folder")
    if kept:
        old.mkdir()
        (old / "mine").write_text("mine")
    put(target, "folder")
    assert (target / "meta.pt").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", *(["last.ckpt.old"] if kept else [])}
    assert not kept or (old / "mine").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EBADF, errno.ENOSYS])
def test_file_systems_that_flush_no_folders(tmp_path, monkeypatch, code):
    flush = os.fsync

    def files_alone(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(code, os.strerror(code))
        flush(number)

    monkeypatch.setattr(os, "fsync", files_alone)
    put(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "new"


def test_the_name_tells_containers_apart():
    numbered = replacing._NUMBERED
    if not numbered.exists():
        pytest.skip("processes are numbered once for all")
    assert replacing._HOST.endswith(f".{numbered.stat().st_ino}")
    assert replacing._NAME.fullmatch(replacing._hidden_name())["host"] == replacing._HOST
