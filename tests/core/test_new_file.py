"""A new file is whole or not there, and no link under its name is followed."""

import pytest

from lightning_plugins.core.new_file import new_file


def test_it_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with new_file(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new" and [*path.parent.iterdir()] == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), new_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_link_is_replaced_not_followed(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside.txt").write_text("mine")
    for name in ("link", ".link.part", "nowhere"):
        goal = tmp_path / ("missing.txt" if name == "nowhere" else "outside.txt")
        (tmp_path / "inside" / name).symlink_to(goal)
    for name in ("link", "nowhere"):
        with new_file(tmp_path / "inside" / name) as file:
            file.write(b"new")
        assert (tmp_path / "inside" / name).read_bytes() == b"new"
    assert (tmp_path / "outside.txt").read_text() == "mine" and not (tmp_path / "missing.txt").exists()
