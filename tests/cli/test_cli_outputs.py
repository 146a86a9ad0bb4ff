import os

from lightning_plugins.cli.outputs import picture_lines


def test_pictures_one_line_each_kind_newest_first_seen_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("images/val/sweep/000001.png", "images/val/sweep/000007.png", "images/old/000001.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.utime(tmp_path / "images/old/000001.png", (1, 1))
    assert picture_lines(tmp_path / "images", since=1000) == ["images/val/sweep/000007.png  (and 1 earlier)"]


def test_many_kinds_of_pictures_take_twelve_lines_at_most(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in range(30):
        (tmp_path / f"images/{kind:02}").mkdir(parents=True)
        (tmp_path / f"images/{kind:02}/1.png").touch()
    lines = picture_lines(tmp_path / "images", since=0)
    assert lines[0] == "images/00/1.png"
    assert lines[10:] == ["and 20 more kinds in images"]
