"""Local folders and parquet files, through the same code as Hub ids."""

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_plugins.data import HFImages, MultiMNIST, hf


@pytest.fixture(autouse=True)
def _quiet_cache(tmp_path_factory, monkeypatch):
    import datasets

    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()


def make_folder(root, sizes=((6, 5),), splits=("train", "test"), count=20):
    """Class folders of colour images; grey value of the red channel tells the number of the image."""
    for split in splits:
        for n in range(count):
            folder = root / split / ("cat", "dog")[n % 2]
            folder.mkdir(parents=True, exist_ok=True)
            width, height = sizes[n % len(sizes)]
            pixels = np.full((height, width, 3), (10 * n, n, 255 - n), dtype=np.uint8)
            pixels[0, 0] = 0
            Image.fromarray(pixels).save(folder / f"{n:02d}.png")
    return str(root)


def make_parquet(path, **columns):
    import datasets

    features = {"img": datasets.Image(), "fine": datasets.ClassLabel(names=list("abc")), **columns}
    rows = {
        "img": [Image.fromarray(np.full((4, 4), 10 * n, dtype=np.uint8)) for n in range(12)],
        "fine": [n % 3 for n in range(12)],
    }
    rows |= {name: [n % 2 for n in range(12)] for name in columns}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    return str(path)


def test_folder_of_images(tmp_path):
    data = HFImages(make_folder(tmp_path), batch_size=6)
    assert (data.image_shape, data.num_classes, data.num_labels) == ((3, 5, 6), 2, 1)
    data.prepare_data()
    batches = list(data.test_dataloader())
    images = (torch.cat([batch["image"] for batch in batches]) * 255).round()
    labels = torch.cat([batch["label"] for batch in batches])
    assert images.shape == (20, 3, 5, 6) and images[:, :, 0, 0].max() == 0
    number = images[:, 1, 1, 1]
    assert torch.equal(labels, number.long() % 2)
    assert torch.equal(images[:, 0, 2, 3], 10 * number) and torch.equal(images[:, 2, 4, 5], 255 - number)
    train, val = data.images("train"), data.images("val")
    assert (len(train.labels), len(val.labels)) == (18, 2)
    numbers = torch.cat([train.pixels[:, 1, 1, 1], val.pixels[:, 1, 1, 1]])
    assert numbers.sort().values.tolist() == list(range(20))


def test_a_named_validation_split_is_used(tmp_path):
    data = HFImages(make_folder(tmp_path, splits=("train", "validation", "test"), count=10))
    assert [len(data.images(split).labels) for split in ("train", "val", "test")] == [10, 10, 10]


def test_no_validation_on_request(tmp_path):
    data = HFImages(make_folder(tmp_path), val_size=0)
    assert data.images("val") is None and len(data.images("train").labels) == 20


def test_parquet_grey_images(tmp_path):
    data = HFImages(make_parquet(tmp_path / "set.parquet"), val_size=4, test_size=0, batch_size=8)
    assert (data.image_shape, data.num_classes) == ((1, 4, 4), 3)
    batch = next(iter(data.train_dataloader()))
    number = (batch["image"][:, 0, 0, 0] * 25.5).round().long()
    assert torch.equal(batch["label"], number % 3)


def test_multimnist_from_parquet(tmp_path):
    assert MultiMNIST(make_parquet(tmp_path / "set.parquet"), pad=1).image_shape == (1, 6, 6)


def test_images_on_disk_equal_those_in_memory(tmp_path, monkeypatch):
    path = make_folder(tmp_path)
    batches = []
    for limit in (2**30, 0):
        monkeypatch.setattr(hf, "_IN_MEMORY", limit)
        data = HFImages(path, batch_size=7, shift=1, flip=True)
        batches.append(list(data.train_dataloader()))
        assert isinstance(data.images("train").pixels, torch.Tensor) == bool(limit)
    for x, y in zip(*batches, strict=True):
        assert torch.equal(x["image"], y["image"]) and torch.equal(x["label"], y["label"])


def test_decoding_is_cached_on_disk(tmp_path, monkeypatch):
    path = make_folder(tmp_path)
    HFImages(path, image_size=4).prepare_data()

    def again(*args, **kwargs):
        raise AssertionError("decoded a second time")

    monkeypatch.setattr("PIL.ImageOps.fit", again)
    assert len(HFImages(path, image_size=4).images("train").labels) == 18


def test_resizing_and_channels(tmp_path):
    data = HFImages(make_folder(tmp_path, sizes=((6, 5), (9, 12))), image_size=4, channels=1)
    assert data.image_shape == (1, 4, 4)
    assert data.images("test").pixels.shape == (20, 1, 4, 4)


def test_the_middle_is_cropped_before_resizing(tmp_path):
    """As CelebA is: an image of 11 x 8 px whose place tells its value, its middle 6 x 6, that halved."""
    folder = tmp_path / "faces"
    folder.mkdir()
    image = np.add.outer(20 * np.arange(8), np.arange(11)).astype(np.uint8)
    for name in "ab":
        Image.fromarray(image).save(folder / f"{name}.png")
    middle = torch.from_numpy(image[1:7, 2:8])

    def first(**arguments):
        data = HFImages(str(folder), label_column="none", val_size=0, **arguments)
        return data.image_shape, data.images("train").pixels[0, 0]

    shape, pixels = first(crop=6)
    assert shape == (1, 6, 6) and torch.equal(pixels, middle)
    assert first()[0] == (1, 8, 11)  # not from the cache of the first
    shape, pixels = first(crop=6, image_size=3)
    assert shape == (1, 3, 3)
    inner = middle.float().reshape(3, 2, 3, 2).mean((1, 3))[1, 1]
    assert abs(pixels[1, 1] - inner) <= 1
    assert not torch.equal(pixels, first(image_size=3)[1])


def test_images_without_labels(tmp_path):
    """A folder of nothing but images; and a set with labels that a generative model does not want."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for n in range(6):
        Image.fromarray(np.full((3, 4), 40 * n, dtype=np.uint8)).save(folder / f"{n}.png")
    data = HFImages(str(folder), label_column="none", val_size=2, test_size=0, batch_size=4)
    assert (data.image_shape, data.num_classes) == ((1, 3, 4), 1)
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    seen = torch.cat([batch["image"][:, 0, 0, 0] for batch in batches])
    assert (seen.sort().values * 255).round().tolist() == [0, 40, 80, 120, 160, 200]
    assert all(torch.equal(batch["label"], torch.zeros(len(batch["image"]), dtype=torch.int64)) for batch in batches)
    with pytest.raises(ValueError) as error:
        HFImages(str(folder)).train_dataloader()
    assert str(error.value) == (
        f"{str(folder)!r} has no candidate for label_column: choose one of its columns image, "
        "or 'none' to do without labels."
    )
    labelled = make_parquet(tmp_path / "set.parquet")
    assert HFImages(labelled).images("train").labels.max() == 2  # and the other is not taken from its cache
    assert HFImages(labelled, label_column="none").images("train").labels.tolist() == [0] * 10


def test_a_yes_or_no_attribute_is_a_label(tmp_path):
    """CelebA has forty of them."""
    import datasets

    path = make_parquet(tmp_path / "set.parquet", Smiling=datasets.Value("bool"))
    data = HFImages(path, label_column="Smiling", val_size=0, test_size=0)
    assert data.num_classes == 2 and data.images("train").labels.tolist() == [0, 1] * 6


def test_sizes_differ(tmp_path):
    with pytest.raises(ValueError) as error:
        HFImages(make_folder(tmp_path, sizes=((6, 5), (9, 12)))).train_dataloader()
    # the first training image is of the class "cat", which are all 6 x 5
    assert str(error.value) == "Images differ in size: 6 x 5 and 9 x 12 px; give image_size."


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("content", ["cut", "no image"])
def test_a_damaged_image_is_named(tmp_path, number, content):
    path = make_folder(tmp_path)
    file = tmp_path / "train" / ("cat", "dog")[number % 2] / f"{number:02d}.png"
    file.write_bytes(file.read_bytes()[:60] if content == "cut" else b"no image")
    with pytest.raises(ValueError) as error:
        HFImages(path).train_dataloader()
    assert str(file) in str(error.value) and str(error.value).endswith("Replace or remove it.")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["img", "fine"])
def test_a_row_without_image_or_label_is_named(tmp_path, column):
    import datasets

    rows = datasets.load_dataset("parquet", data_files=make_parquet(tmp_path / "a.parquet"), split="train")
    rows = rows.cast_column("img", datasets.Image(decode=False))
    values = [None if n == 5 else value for n, value in enumerate(rows[column])]
    rows = rows.remove_columns(column).add_column(column, values, feature=rows.features[column])
    rows.to_parquet(tmp_path / "b.parquet")
    path = str(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=f"b.parquet, train row 5 has no {'image' if column == 'img' else 'label'}"):
        HFImages(path, val_size=0).train_dataloader()


def test_two_label_columns(tmp_path):
    import datasets

    path = make_parquet(tmp_path / "set.parquet", coarse=datasets.ClassLabel(names=list("xy")))
    with pytest.raises(ValueError) as error:
        _ = HFImages(path).num_classes
    assert str(error.value) == (
        f"{path!r} has several candidates (fine, coarse) for label_column: choose one of its columns "
        "img, fine, coarse, or 'none' to do without labels."
    )
    assert HFImages(path, label_column="coarse").num_classes == 2


def test_integers_are_labels_where_there_are_no_class_labels(tmp_path):
    import datasets

    path = tmp_path / "set.parquet"
    rows = {"picture": [Image.fromarray(np.zeros((3, 3), dtype=np.uint8))] * 6, "y": [0, 1, 2, 3, 0, 1]}
    features = datasets.Features({"picture": datasets.Image(), "y": datasets.Value("int32")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    assert HFImages(str(path)).num_classes == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"label_column": "lable"}, "label_column='lable' is no column of PATH, which has image, label."),
        ({"image_column": "img"}, "image_column='img' is no column of PATH, which has image, label."),
        ({"train_split": "trian"}, "PATH has no split 'trian'; its splits are train."),
        ({"val_split": "holdout"}, "PATH has no split 'holdout'; its splits are train."),
        ({"test_split": "tset"}, "PATH has no split 'tset'; its splits are train."),
        ({"channels": 2}, "channels=2 must be one of 1, 3: 1 is grey, 3 colour."),
        ({"image_size": 0}, "image_size=0 must be 1 or more."),
        ({"crop": 0}, "crop=0 must be 1 or more."),
        ({"crop": 6}, "An image has 6 x 5 px, less than crop=6: give a smaller one, or null."),
    ],
)
def test_wrong_names_in_one_sentence(tmp_path, arguments, sentence):
    path = make_folder(tmp_path, splits=("train",))
    with pytest.raises(ValueError) as error:
        data = HFImages(path, **arguments)
        data.val_dataloader(), data.test_dataloader()
    assert str(error.value).replace(repr(path), "PATH") == sentence


@pytest.mark.parametrize("path", ["no-one/no-such-set", "/no/such/folder", "no.parquet"])
def test_nothing_at_the_path(path):
    with pytest.raises(FileNotFoundError) as error:
        _ = HFImages(path).image_shape
    message = str(error.value)
    assert message.startswith(f"HFImages cannot read path={path!r}: ") and "\n" not in message
    assert message.endswith(
        ". Give a dataset id of the Hub (its first use needs the network), "
        "a folder with one folder of images for each class, or a parquet file."
    )
