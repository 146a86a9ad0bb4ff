"""A stranger's folder of pictures: split, read by the names of its folders, and never run."""

import json
import zipfile
from itertools import chain

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from lightning_plugins.data import HFImages
from lightning_plugins.data.loading import stratified_split


@pytest.fixture(autouse=True)
def _quiet_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def picture(path, value=0, size=(5, 4), mode="RGB"):
    """A picture whose every pixel tells its value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


def pets(root, cats=20, dogs=10, **options):
    """A folder of each class; values are numbers."""
    for n in range(cats + dogs):
        picture(root / ("cat" if n < cats else "dog") / f"{n}.png", n, **options)
    return str(root)


def numbers(data, split):
    return (data.images(split).pixels[:, 0, 0, 0]).tolist()


def test_a_folder_without_splits_is_split_by_seed_and_class(tmp_path):
    path = pets(tmp_path / "pets")
    data = HFImages(path, val_size=0.1, test_size=6)
    parts = {split: numbers(data, split) for split in ("train", "val", "test")}
    assert sorted(chain(*parts.values())) == list(range(30))
    cats = {split: sum(n < 20 for n in part) for split, part in parts.items()}
    assert {split: len(part) for split, part in parts.items()} == {"train": 21, "val": 3, "test": 6}
    assert cats == {"train": 14, "val": 2, "test": 4}
    again, other = (HFImages(path, val_size=0.1, test_size=6, seed=seed) for seed in (0, 1))
    assert numbers(again, "test") == parts["test"] != numbers(other, "test")
    labels = data.images("test").labels.tolist()
    assert labels == [int(n >= 20) for n in parts["test"]]


@pytest.mark.parametrize(
    "sizes", [{"val": 0.1, "test": 0.1}, {"val": 3, "test": 0}, {"val": 0, "test": 0.5}, {"val": 11}]
)
def test_each_part_has_its_share_of_each_class(sizes):
    """To within one sample, and of a class's samples one is left to train."""
    for seed in range(20):
        labels = torch.cat([torch.full((n,), c) for c, n in enumerate((1, 2, 30, 7))])
        labels = labels[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]
        parts = stratified_split(labels, sizes, seed)
        whole = torch.cat([*parts.values()])
        assert whole.sort().values.tolist() == list(range(40))
        assert all(index.tolist() == index.sort().values.tolist() for index in parts.values())
        assert labels[parts["train"]].unique().tolist() == [0, 1, 2, 3]
        for split, size in sizes.items():
            count = size if isinstance(size, int) else round(40 * size)
            for c, n in enumerate((1, 2, 30, 7)):
                assert abs(int((labels[parts[split]] == c).sum()) - count * n / 40) < 2 - (len(sizes) < 2)


def test_too_few_to_hold_out():
    with pytest.raises(ValueError) as error:
        stratified_split(torch.zeros(4, dtype=torch.int64), {"val": 2, "test": 0.5}, 0)
    assert str(error.value) == "val_size=2 and test_size=0.5 must leave training samples of 4: give less, such as 0.1."
    parts = stratified_split(torch.zeros(3, dtype=torch.int64), {"val": 0.1, "test": 0.1}, 0)
    assert {name: len(index) for name, index in parts.items()} == {"val": 1, "test": 1, "train": 1}


def test_without_a_test_on_request(tmp_path):
    data = HFImages(pets(tmp_path / "pets"), test_size=0)
    assert len(data.images("train").labels) == 27
    with pytest.raises(ValueError) as error:
        data.test_dataloader()
    assert str(error.value) == "HFImages has no test images; set test_size above 0."


def test_what_has_a_test_split_is_not_split_again(tmp_path):
    pets(tmp_path / "pets" / "train")
    pets(tmp_path / "pets" / "test", 2, 2)
    data = HFImages(str(tmp_path / "pets"))
    assert [len(data.images(split).labels) for split in ("train", "val", "test")] == [27, 3, 4]
    assert data.files("test") == ["test/cat/0.png", "test/cat/1.png", "test/dog/2.png", "test/dog/3.png"]


def test_it_is_predicted_as_a_whole_with_the_names_of_its_files(tmp_path):
    data = HFImages(pets(tmp_path / "pets", 3, 2), batch_size=5)
    (batch,) = data.predict_dataloader()
    assert (batch["image"][:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 3, 4]
    assert data.files(data.predict_split) == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/3.png", "dog/4.png"]
    assert (data.class_names, data.labelled) == (["cat", "dog"], True)
    assert data.files("val") == [f"{'cat' if n < 3 else 'dog'}/{n}.png" for n in numbers(data, "val")]


def test_names_that_look_like_splits_lose_nothing(tmp_path):
    """A class called train, and pictures called val and test; ``datasets`` alone takes one of the four."""
    root = tmp_path / "my test"
    for n, name in enumerate(("train/val_1.png", "train/2.png", "car/test.png", "car[1]/dev-3.jpg", "car[1]/b.PNG")):
        picture(root / name, 50 * n)
    data = HFImages(str(root), val_size=0, test_size=0)
    assert data.class_names == ["car", "car[1]", "train"]
    assert sorted(data.files("train")) == sorted(
        ["train/val_1.png", "train/2.png", "car/test.png", "car[1]/dev-3.jpg", "car[1]/b.PNG"]
    )


@pytest.mark.parametrize("names", [("cat/1.png", "dog/2024/2.png"), ("cat/1.png", "2.png"), ("a/b/cat/1.png",)])
def test_pictures_above_or_below_the_classes_are_refused(tmp_path, names):
    for name in names:
        picture(tmp_path / "pets" / name)
    with pytest.raises(ValueError, match="lies in no folder of a class as others do: give one folder of images for"):
        _ = HFImages(str(tmp_path / "pets")).image_shape
    data = HFImages(str(tmp_path / "pets"), label_column="none", val_size=0, test_size=0)
    assert len(data.images("train").labels) == len(names)
    assert not data.labelled and data.class_names is None


def test_other_files_are_left_out_and_told(tmp_path, caplog):
    path = pets(tmp_path / "pets", 4, 4)
    for name in ("notes.txt", "cat/Thumbs.db", "cat/a.heic", "cat/.hidden.png", ".DS_Store", "__MACOSX/cat/1.png"):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(b"?")
    with caplog.at_level("INFO", "lightning.pytorch"):
        data = HFImages(path, val_size=0, test_size=0)
        assert len(data.images("train").labels) == 8
    (told,) = [record.message for record in caplog.records if "left out" in record.message]
    assert told == f"{path!r}: left out as no pictures of a known kind: 1 .db, 1 .heic, 1 .txt."


def test_how_many_are_held_out_is_told(tmp_path, caplog):
    path = pets(tmp_path / "pets")
    with caplog.at_level("INFO", "lightning.pytorch"):
        HFImages(path).images("train")
    assert (
        f"HFImages: {path!r} has no test split: of 30 images 3 for val (val_size=0.1) and 3 for test (test_size=0.1) "
        "are held out."
    ) in caplog.messages


@pytest.mark.parametrize("whole", [True, False])
def test_what_save_to_disk_wrote(tmp_path, whole):
    import datasets

    columns = {"image": [Image.new("L", (4, 4), 10 * n) for n in range(20)], "label": [n % 2 for n in range(20)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict(columns, features=features)
    found = (
        rows if whole else datasets.DatasetDict({"train": rows.select(range(16)), "test": rows.select(range(16, 20))})
    )
    found.with_format("numpy").save_to_disk(tmp_path / "saved")
    data = HFImages(str(tmp_path / "saved"))
    assert (data.image_shape, data.class_names) == ((1, 4, 4), ["a", "b"])
    sizes = [len(data.images(split).labels) for split in ("train", "val", "test")]
    assert sizes == ([16, 2, 2] if whole else [14, 2, 4])
    assert numbers(data, "test") == ([10 * n for n in data._carved["test"]] if whole else [160, 170, 180, 190])
    assert data.files("test") is None


def test_a_folder_of_parquet_files(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for part in range(2):
        columns = {"image": [Image.new("L", (4, 4), n) for n in range(10)], "label": [n % 2 for n in range(10)]}
        (tmp_path / "tables").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "tables" / f"part{part}.parquet")
    data = HFImages(str(tmp_path / "tables"))
    assert [len(data.images(split).labels) for split in ("train", "val", "test")] == [16, 2, 2]


def test_a_table_of_another_program(tmp_path):
    """Bytes under a name, classes as texts: what must be said is said, and then it is taken."""
    picture(tmp_path / "a.png", 7)
    content = (tmp_path / "a.png").read_bytes()
    table = {"pixels": [content] * 8, "kind": ["cat", "dog"] * 4, "number": [0, 1] * 4}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "own.parquet")
    path = str(tmp_path / "own.parquet")
    with pytest.raises(ValueError, match="no candidate for image_column: choose one of its columns pixels, kind, num"):
        _ = HFImages(path).image_shape
    with pytest.raises(ValueError, match=r"label_column='kind' of .* not whole numbers from 0 on: give another column"):
        _ = HFImages(path, image_column="pixels", label_column="kind").num_classes
    data = HFImages(path, image_column="pixels", val_size=0, test_size=0)
    assert data.images("train").labels.tolist() == [0, 1] * 4 and numbers(data, "train") == [7] * 8


# Data, and nothing else


def test_nothing_of_a_folder_is_imported_or_run(tmp_path, monkeypatch):
    path = pets(tmp_path / "pets", 4, 4)
    evil = "open('../ran', 'w').close()\n"
    for name in ("pets.py", "cat/__init__.py", "conftest.py", "dataset_builder.py"):
        (tmp_path / "pets" / name).write_text(evil)
    (tmp_path / "pets" / "README.md").write_text(
        '---\nconfigs:\n- config_name: x\n  data_files: "https://x.y/z"\n---\n'
    )
    monkeypatch.chdir(tmp_path / "pets")
    assert len(HFImages(path, val_size=0, test_size=0).images("train").labels) == 8
    assert not (tmp_path / "ran").exists()


def test_a_program_that_draws_is_no_picture(tmp_path):
    """PostScript, which Pillow would give to an interpreter, by whatever ending."""
    path = pets(tmp_path / "pets", 4, 4)
    (tmp_path / "pets" / "cat" / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 4\nshowpage\n")
    with pytest.raises(ValueError, match=r"0.png\) cannot be read as an image: it is of no known format. Replace or"):
        HFImages(path).train_dataloader()


def test_a_table_that_names_an_address_is_not_followed(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": None, "path": "https://example.org/a.png"}] * 2, "label": [0, 1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    pyarrow.parquet.write_table(table.data.table, tmp_path / "a.parquet")  # its own to_parquet would fetch it
    with pytest.raises(ValueError, match=r"cannot be read as an image: it is no file on this machine. Replace or"):
        HFImages(str(tmp_path / "a.parquet"), val_size=0, test_size=0).images("train")


@pytest.mark.parametrize("content", ["{}", "[]", '{"_data_files": 3}', "broken"])
def test_what_save_to_disk_did_not_write(tmp_path, content):
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text(content)
    with pytest.raises(FileNotFoundError, match=f"HFImages cannot read path={str(folder)!r}: "):
        _ = HFImages(str(folder)).image_shape


def test_a_feature_that_is_no_feature_is_not_built(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "saved")
    info = json.loads((tmp_path / "saved" / "dataset_info.json").read_text())
    info["features"]["a"] = {"_type": "generate_from_dict", "obj": {}}
    (tmp_path / "saved" / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(FileNotFoundError, match="HFImages cannot read path="):
        _ = HFImages(str(tmp_path / "saved")).image_shape


def test_an_archive_is_left_where_it_is(tmp_path, caplog):
    path = pets(tmp_path / "pets", 4, 4)
    with zipfile.ZipFile(tmp_path / "pets" / "cat" / "more.zip", "w") as archive:
        archive.write(tmp_path / "pets" / "cat" / "0.png", "cat/9.png")
    with caplog.at_level("INFO", "lightning.pytorch"):
        assert len(HFImages(path, val_size=0, test_size=0).images("train").labels) == 8
    assert "1 .zip" in caplog.text


def test_mixed_sizes_modes_and_turned_photographs(tmp_path):
    """What is in a stranger's folder: grey, colour, transparent, palettes, turned by a camera."""
    root = tmp_path / "mixed"
    for n, mode in enumerate(("RGB", "L", "RGBA", "P", "1", "LA")):
        (root / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + n, 30), (200, 100, 0)).convert(mode).save(root / "ab"[n % 2] / f"{n}.png")
    turned = Image.fromarray(np.repeat(np.linspace(0, 255, 40, dtype=np.uint8)[:, None], 20, axis=1)).convert("RGB")
    exif = Image.Exif()
    exif[274] = 3  # upside down
    turned.save(root / "b" / "9.jpg", exif=exif)
    data = HFImages(str(root), image_size=16, val_size=0, test_size=0)
    assert data.image_shape == (3, 16, 16)
    pixels = data.images("train").pixels[data.files("train").index("b/9.jpg")].float()
    assert pixels[:, 0].mean() > 150 > 100 > pixels[:, -1].mean()  # the middle of it, the right way up
    with pytest.raises(ValueError, match=r"Images differ in size: .* px; give image_size"):
        HFImages(str(root), val_size=0, test_size=0).images("train")


def test_a_size_that_is_not_the_pictures_is_told(tmp_path, caplog):
    """A config's image_size stays when the data are replaced on the command line."""
    path = pets(tmp_path / "pets")
    with caplog.at_level("INFO", logger="lightning"):
        assert HFImages(path, image_size=2).image_shape == (3, 2, 2)
        assert f"image_size=2 makes 2 x 2 pixels of each image; the first one of {path!r} has 5 x 4." in caplog.text
        caplog.clear()
        assert HFImages(path).image_shape == (3, 4, 5)
    assert "makes" not in caplog.text
