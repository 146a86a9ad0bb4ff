"""What a stranger sends is data: none of it runs or is imported, nothing is written elsewhere, one sentence is told."""

import io
import os
import sys
import tempfile

import pytest
from hostile import HOSTILE, MODULE

from lightning_plugins.cli import main


class Unread(io.StringIO):
    """Standard input that says yes to whoever asks, and remembers it."""

    def __init__(self):
        super().__init__("y\n" * 100)

    @property
    def was_read(self):
        return self.tell() > 0


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """Home, current folder and folder for temporary files below one that is watched, with ``evil_module`` at hand."""
    for name in ("home", "work", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "evil_module.py").write_text(MODULE)
    (tmp_path / "home" / ".bashrc").write_text("mine")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(sys, "stdin", Unread())
    return tmp_path


def contents(folder):
    """What every path below the folder but ``out`` holds: bytes, a link's goal, or that it is neither."""
    paths = (path for path in folder.rglob("*") if folder / "work" / "out" not in (path, *path.parents))
    return {path: os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes() for path in paths}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_told_in_a_sentence_and_nothing_else_happens(sandbox, capsys, name):
    words = HOSTILE[name](sandbox)
    before, modules = contents(sandbox), set(sys.modules)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(words)
    told = capsys.readouterr().err
    assert "error: " in told, told
    sentence = told[told.index("error: ") :]
    assert contents(sandbox) == before
    assert not sys.stdin.was_read
    assert [module for module in set(sys.modules) - modules if "evil" in module] == []
    assert stop.value.code == 2
    assert len(sentence.splitlines()) <= 5
    assert sentence.replace("\n", "").isprintable()
    assert "Traceback" not in sentence


def test_there_are_enough():
    assert len(HOSTILE) >= 30
