"""Folders of idx files, whole and damaged."""

import gzip
import struct

import numpy as np
import pytest
import torch

from lightning_plugins.data import IdxImages, MultiMNIST


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": rng.integers(0, 256, (40, 5, 6), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(40) % 7).astype(np.uint8),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (11, 5, 6), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (np.arange(11) % 7).astype(np.uint8),
    }


@pytest.fixture
def folder(tmp_path, arrays):
    for number, (name, array) in enumerate(arrays.items()):
        if number % 2:
            (tmp_path / name).write_bytes(idx_bytes(array))
        else:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return tmp_path


def test_reads_plain_and_compressed_files(folder, arrays):
    data = IdxImages(str(folder), val_size=10, batch_size=4)
    assert (data.image_shape, data.num_classes, data.num_labels) == ((1, 5, 6), 7, 1)
    test = list(data.test_dataloader())
    images = torch.cat([batch["image"] for batch in test])
    np.testing.assert_allclose(images[:, 0], arrays["t10k-images-idx3-ubyte"] / np.float32(255), rtol=1e-6)
    assert torch.cat([batch["label"] for batch in test]).tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()


def test_validation_images_are_held_out_by_the_seed(folder, arrays):
    def parts(seed):
        data = IdxImages(str(folder), val_size=10, seed=seed)
        return [data.images(split).pixels[:, 0].numpy() for split in ("train", "val")]

    train, val = parts(0)
    assert (len(train), len(val)) == (30, 10)
    everything = {image.tobytes() for image in np.concatenate([train, val])}
    assert everything == {image.tobytes() for image in arrays["train-images-idx3-ubyte"]}
    assert (parts(0)[1] == val).all() and (parts(1)[1] != val).any()


def test_no_validation(folder):
    data = IdxImages(str(folder), val_size=0, batch_size=40)
    assert len(data.images("train").labels) == 40
    with pytest.raises(ValueError) as error:
        data.val_dataloader()
    assert str(error.value) == "IdxImages has no val images; set val_size above 0."


def test_multimnist_reads_the_folder(folder):
    data = MultiMNIST(str(folder), shift=1, pad=2)
    assert (data.image_shape, data.num_classes) == ((1, 9, 10), 7)


def test_wrong_folder():
    with pytest.raises(FileNotFoundError) as error:
        _ = IdxImages("no/such/folder").image_shape
    assert str(error.value) == "IdxImages: folder='no/such/folder' is not a folder."


def test_missing_file(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError) as error:
        IdxImages(str(folder), val_size=5).test_dataloader()
    assert str(error.value) == (
        f"IdxImages: folder={str(folder)!r} has no file t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz."
    )


def _damage_error(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        IdxImages(str(folder), val_size=5).train_dataloader()
    return str(error.value).replace(f"{folder}/", "")


def test_truncated_compressed_file(folder):
    name = "train-images-idx3-ubyte.gz"
    content = (folder / name).read_bytes()[:-100]
    assert _damage_error(folder, name, content) == f"{name} is truncated or damaged: it cannot be uncompressed."


def test_not_compressed(folder, arrays):
    name = "train-images-idx3-ubyte.gz"
    assert _damage_error(folder, name, idx_bytes(arrays[name[:-3]])) == (
        f"{name} is not a gzip file (or damaged); if it is not compressed, drop the .gz."
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda b: b[:-3], "is truncated: its header announces 40 bytes of data, it holds 37."),
        (lambda b: b + b"ab", "is too long: its header announces 40 bytes of data, it holds 42."),
        (lambda b: b[:5], "is truncated: it holds 5 bytes, less than the header of an idx file."),
        (lambda b: b"\x00\x00\x08\x03" + b[4:], "has magic number 0x0803, an idx file of labels 0x0801."),
        (lambda b: b"\x89PNG" + b[4:], "has magic number 0x89504e47, an idx file of labels 0x0801."),
    ],
)
def test_damaged_labels(folder, arrays, change, sentence):
    name = "train-labels-idx1-ubyte"
    assert _damage_error(folder, name, change(idx_bytes(arrays[name]))) == f"{name} {sentence}"


@pytest.mark.parametrize("shape", [(0, 5, 6), (40, 0, 6)])
def test_no_images(folder, arrays, shape):
    name = "train-images-idx3-ubyte.gz"
    content = gzip.compress(idx_bytes(np.zeros(shape, dtype=np.uint8)))
    told = " x ".join(map(str, shape))
    assert _damage_error(folder, name, content).startswith(f"{name} is empty: its header announces {told} bytes.")
    with pytest.raises(ValueError, match="is empty"):
        _ = IdxImages(str(folder)).image_shape


def test_other_classes_in_the_test_images(folder):
    labels = np.full(11, 9, dtype=np.uint8)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    with pytest.raises(ValueError, match="has labels up to 9, but those of the training images are 0 to 6"):
        IdxImages(str(folder), val_size=5).test_dataloader()


def test_counts_differ(folder):
    name = "train-labels-idx1-ubyte"
    assert _damage_error(folder, name, idx_bytes(np.zeros(39, dtype=np.uint8))) == (
        f"train-images-idx3-ubyte.gz holds 40 images but {name} 39 labels: the two files do not belong together."
    )
