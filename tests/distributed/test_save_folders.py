"""Two processes write one sharded checkpoint: the folder before it stays until the new one is whole."""

import os
import signal

import pytest
from ranks import torchrun

from lightning_plugins.core import replacing

pytestmark = pytest.mark.ddp


def test_sharded_checkpoints_are_replaced_as_a_whole(tmp_path):
    (tmp_path / "run").mkdir()
    with torchrun("save_folders", tmp_path / "run", cwd=tmp_path):
        pass
    assert (tmp_path / "run" / "done").exists()


@pytest.fixture
def folders(tmp_path):
    """A new folder of files, and an old one in its place."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    return tmp_path / "new", tmp_path / "old"


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_is_replaced(folders, monkeypatch, in_one_step):
    """Where the system exchanges no names, the old one steps aside first."""
    if not in_one_step:
        monkeypatch.setattr(replacing, "_exchange", lambda *paths: False)
    source, target = folders
    replacing.put(source, target)
    assert (target / "x").read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["old"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_process_killed_before_the_old_folder_is_removed(folders, monkeypatch):
    source, target = folders
    if (child := os.fork()) == 0:
        try:
            replacing._remove = lambda path: os.kill(os.getpid(), signal.SIGKILL)
            with replacing.replacing(target) as partial:
                source.rename(partial)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (target / "x").read_text() == "new"
    (left,) = set(target.parent.iterdir()) - {target}
    assert (left / "x").read_text() == "old"
    replacing.remove_leftovers(target.parent)
    assert [path.name for path in target.parent.iterdir()] == ["old"]


def test_a_process_killed_between_two_names(folders, monkeypatch):
    """On a disk that exchanges none: the old folder stays whole, to be found: a user may have named it so."""
    monkeypatch.setattr(replacing, "_exchange", lambda *paths: False)
    source, target = folders
    old = target.with_name("old.old")
    target.rename(old)  # here it ended
    replacing.remove_leftovers(target.parent)
    assert (old / "x").read_text() == "old"
    replacing.put(source, target)
    assert (target / "x").read_text() == "new"
    assert (old / "x").read_text() == "old"
