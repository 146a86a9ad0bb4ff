"""Folders with the four files of MNIST: Fashion-MNIST, KMNIST, EMNIST and QMNIST come in the same form."""

import gzip
import math
import struct
import zlib
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.data.images import ImageData, LabelledImages
from lightning_plugins.data.loading import VAL_SIZE, random_split

_PREFIX = {"train": "train", "val": "train", "test": "t10k"}


class IdxImages(ImageData):
    """Images from a folder with the four files of MNIST, or of a data set that comes in the same form.

    The files are ``{train,t10k}-images-idx3-ubyte`` and ``{train,t10k}-labels-idx1-ubyte``, each plain or ``.gz``.

    Args:
        folder: folder with the four files.
        val_size: training images held out at random, by the seed, for validation: a count, or a fraction if a float; 0
            for none, there is no validation then. 5,000 is the custom for MNIST.
        batch_size: images in a batch of one process.
        num_workers: processes that prepare batches; 0 is the fastest here.
        seed: seed of the order, the augmentation and the validation images.
        shift: most pixels that a training image moves by, in both directions, on zeros; 2 in Sabour et al. 2017.

    Raises:
        FileNotFoundError: the folder or one of the files is not there (when data are first asked for).
        ValueError: an argument is out of range, a file is empty, truncated or no idx file, the numbers of images and
            labels differ, or test images have other classes.

    Source: the format, LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
    """

    def __init__(
        self,
        folder: str,
        val_size: int | float = 5000,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        shift: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, shift)
        must.check(locals(), folder=must.path, val_size=VAL_SIZE)
        self.folder, self.val_size = Path(folder).expanduser(), val_size

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """``(1, H, W)`` as the training file says."""
        _, height, width = read_idx_shape(self._file("train-images-idx3-ubyte"), dims=3)
        return 1, height, width

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        """One more than the largest training label."""
        return int(read_idx(self._file("train-labels-idx1-ubyte"), dims=1).max()) + 1

    def read(self, split: str) -> LabelledImages | None:
        """One split; training and validation share a file."""
        images_file = self._file(f"{_PREFIX[split]}-images-idx3-ubyte")
        labels_file = self._file(f"{_PREFIX[split]}-labels-idx1-ubyte")
        images, labels = read_idx(images_file, dims=3), read_idx(labels_file, dims=1)
        if len(images) != len(labels):
            raise ValueError(
                f"{images_file} holds {len(images)} images but {labels_file.name} {len(labels)} labels: "
                "the two files do not belong together."
            )
        if split == "test" and int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"{labels_file} has labels up to {int(labels.max())}, but those of the training images are 0 to "
                f"{self.num_classes - 1}: the two files do not belong together."
            )
        if split != "test":
            train, val = random_split(len(labels), self.val_size, self.seed)
            index = train if split == "train" else val
            if not len(index):
                return None
            images, labels = images[index], labels[index]
        return LabelledImages(images.unsqueeze(1), labels.long())

    def _file(self, name: str) -> Path:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"IdxImages: folder={str(self.folder)!r} is not a folder.")
        for path in (self.folder / name, self.folder / f"{name}.gz"):
            if path.is_file():
                return path
        raise FileNotFoundError(f"IdxImages: folder={str(self.folder)!r} has no file {name} or {name}.gz.")


def read_idx_shape(path: Path, dims: int) -> tuple[int, ...]:
    """Lengths of the dimensions, from the header alone."""
    return _header(_bytes(path, 4 + 4 * dims), path, dims)


def read_idx(path: Path, dims: int) -> Tensor:
    """Read an idx file of unsigned bytes.

    Args:
        path: file, compressed if it ends in ``.gz``.
        dims: number of dimensions wanted: 3 for images, 1 for labels.

    Returns:
        uint8 tensor with ``dims`` dimensions.

    Raises:
        ValueError: truncated, not compressed although named so, or not an idx file of bytes with ``dims`` dimensions.
    """
    content = _bytes(path)
    shape = _header(content, path, dims)
    start, size = 4 + 4 * dims, math.prod(shape)
    if len(content) - start != size:
        state = "is truncated" if len(content) - start < size else "is too long"
        raise ValueError(f"{path} {state}: its header announces {size} bytes of data, it holds {len(content) - start}.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(shape)


def _bytes(path: Path, count: int = -1) -> bytes:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            return file.read(count)
    except (EOFError, zlib.error) as error:
        raise ValueError(f"{path} is truncated or damaged: it cannot be uncompressed.") from error
    except gzip.BadGzipFile as error:
        raise ValueError(f"{path} is not a gzip file (or damaged); if it is not compressed, drop the .gz.") from error


def _header(content: bytes, path: Path, dims: int) -> tuple[int, ...]:
    if len(content) < 4 + 4 * dims:
        raise ValueError(f"{path} is truncated: it holds {len(content)} bytes, less than the header of an idx file.")
    magic, *shape = struct.unpack_from(f">{1 + dims}I", content)
    wanted = 0x0800 + dims  # 08: unsigned bytes
    if magic != wanted:
        kind = {1: "labels", 3: "images"}[dims]
        raise ValueError(f"{path} has magic number {magic:#06x}, an idx file of {kind} {wanted:#06x}.")
    if not math.prod(shape):
        told = " x ".join(map(str, shape))
        raise ValueError(f"{path} is empty: its header announces {told} bytes. Give a file with images.")
    return tuple(shape)
