"""A new folder is whole or not there, and says why where it cannot be written."""

import errno

import pytest

from lightning_plugins.core.new_folder import new_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_takes_its_name_when_it_is_whole(tmp_path):
    folder = tmp_path / "new" / "folder"
    with new_folder(folder) as partial:
        (partial / "file.txt").write_text("new")
        assert not folder.exists() and partial.parent == folder.parent
    assert names(folder.parent) == ["folder"] and (folder / "file.txt").read_text() == "new"


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "folder").mkdir()
    with new_folder(tmp_path / "folder") as partial:
        (partial / "file.txt").touch()
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["file.txt"]


@pytest.mark.parametrize("kind", ["a folder with a file", "a file"])
def test_what_is_there_stays(tmp_path, kind):
    folder = tmp_path / "folder"
    if kind == "a file":
        folder.write_text("old")
    else:
        folder.mkdir()
        (folder / "old").touch()
    with pytest.raises(FileExistsError, match="folder exists and is not empty"), new_folder(folder):
        pytest.fail("it was opened")
    assert names(tmp_path) == ["folder"]
    assert folder.read_text() == "old" if kind == "a file" else names(folder) == ["old"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a wrong value"), RuntimeError("too large")])
def test_an_error_leaves_nothing_and_is_passed_on(tmp_path, error):
    with pytest.raises(type(error)) as caught, new_folder(tmp_path / "folder") as partial:
        (partial / "half.txt").write_text("half")
        raise error
    assert caught.value is error and names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)."), r"device \(os error 28\)"),
    ],
    ids=["the system's", "safetensors'"],
)
def test_where_it_cannot_be_written_one_sentence_says_so(tmp_path, error, reason):
    sentence = rf"folder cannot be written, and nothing of it was: .*{reason}\.$"
    with pytest.raises(OSError, match=sentence) as caught, new_folder(tmp_path / "folder") as partial:
        (partial / "half.txt").write_text("half")
        raise error
    assert caught.value.__cause__ is error and names(tmp_path) == []


def test_a_file_in_the_way_of_its_parents_is_told(tmp_path):
    (tmp_path / "parent").write_text("a file")
    with pytest.raises(OSError, match="cannot be written"), new_folder(tmp_path / "parent" / "folder"):
        pytest.fail("it was opened")
    assert (tmp_path / "parent").read_text() == "a file"


def test_of_two_at_once_the_first_that_is_whole_stays(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(OSError, match="cannot be written"), new_folder(folder) as late:
        (late / "late").touch()
        with new_folder(folder) as early:
            (early / "early").touch()
    assert names(tmp_path) == ["folder"] and names(folder) == ["early"]
