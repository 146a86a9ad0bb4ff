"""What all image data modules share: images in memory, augmentation of a whole batch, resumable loaders.

Shapes: N images of a split, B images of a batch, C channels, H height, W width.
"""

from collections.abc import Sized
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from lightning_plugins.core import arguments as must
from lightning_plugins.core.random_numbers import random_integers
from lightning_plugins.data.loading import KeyBatches, KeyLoader, SplitLoaders, share_of_run

_SHIFT_Y, _SHIFT_X, _FLIP = range(3)  # streams of random numbers, one for each use
_NOISE = {"train": (20, 21), "val": (22, 23)}  # which labels are wrong, and what they say; test labels stay clean
_RESOLUTION = 2**30  # of a probability


class Pixels(Protocol):
    """Images that can be gathered: a uint8 tensor ``(N, C, H, W)``, or something on disk that acts like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N, C, H, W."""
        ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


class LabelledImages(NamedTuple):
    """One split: ``pixels`` ``(N, C, H, W)`` uint8 and ``labels`` ``(N,)`` int64."""

    pixels: Pixels
    labels: Tensor


def shift_images(images: Tensor, down: Tensor, right: Tensor, margin: int) -> Tensor:
    """Move every image by whole pixels of its own, on a zero background that is ``margin`` px wider on each side.

    Args:
        images: ``(B, C, H, W)`` of any dtype.
        down: ``(B,)`` int64, pixels to move down; negative: up.
        right: ``(B,)`` int64, pixels to move right; negative: left.
        margin: px added on each side; what is moved out of the picture is lost.

    Returns:
        ``(B, C, H + 2 margin, W + 2 margin)``.
    """
    reach = int(torch.stack([down, right]).abs().max()) if len(images) else 0
    height, width = images.shape[-2] + 2 * margin, images.shape[-1] + 2 * margin
    padded = F.pad(images, [margin + reach] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # (B, C, 2 reach + 1, 2 reach + 1, height, width), a view
    return windows[torch.arange(len(images)), :, reach - down, reach - right]


class KeyedImages(Dataset):
    """Batches of one split by keys: ``{"image": (B, C, H, W) float32 in [0, 1], "label": (B,) int64}``.

    Args:
        data: images and labels of the split.
        seed: seed of the augmentation.
        shift: most pixels that an image moves by, in both directions; 0 for none.
        flip: whether each image is mirrored left to right with probability one half.
    """

    def __init__(self, data: LabelledImages, seed: int = 0, shift: int = 0, flip: bool = False) -> None:
        self.data, self.seed, self.shift, self.flip = data, seed, shift, flip

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, key: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([key]).items()}

    def __getitems__(self, keys: list[int]) -> dict[str, Tensor]:
        """The finished batch of these keys."""
        k = torch.tensor(keys, dtype=torch.int64)
        i = k % len(self)
        images = self.data.pixels[i]
        if self.shift:
            down, right = self.offsets(k, _SHIFT_Y), self.offsets(k, _SHIFT_X)
            images = shift_images(images, down, right, margin=0)
        if self.flip:
            mirrored = random_integers(k, 2, self.seed, _FLIP).bool()
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return {"image": to_float(images), "label": self.data.labels[i]}

    def offsets(self, keys: Tensor, stream: int) -> Tensor:
        """``(B,)`` uniform whole px in [-shift, shift]."""
        return random_integers(keys, 2 * self.shift + 1, self.seed, stream) - self.shift


def symmetric_noise(labels: Tensor, rate: float, num_classes: int, seed: int, streams: tuple[int, int]) -> Tensor:
    r"""Replace labels by wrong ones, uniform over the other classes.

    .. math:: P(\tilde y = y) = 1 - r, \qquad P(\tilde y = j) = \frac{r}{J - 1} \quad (j \ne y)

    Args:
        labels: ``(N,)`` int64 true classes y.
        rate: r in [0, 1], the expected share of wrong labels. Where a paper draws the new label from all J classes at
            rate r', it means :math:`r = r' (J - 1) / J`.
        num_classes: J, 2 or more.
        seed: with the place in ``labels`` it decides everything.
        streams: two streams of random numbers: which labels, and what they become.

    Returns:
        ``(N,)`` int64.

    Source: Ghosh, Kumar, Sastry 2017, arXiv 1712.09482, section 2 (symmetric or uniform noise).

    Example:
        >>> symmetric_noise(torch.zeros(8, dtype=torch.int64), 0.5, 3, seed=0, streams=(0, 1))
        tensor([2, 0, 0, 2, 0, 0, 2, 0])
    """
    index = torch.arange(len(labels))
    wrong = random_integers(index, _RESOLUTION, seed, streams[0]) < rate * _RESOLUTION
    step = 1 + random_integers(index, num_classes - 1, seed, streams[1])
    return torch.where(wrong, (labels + step) % num_classes, labels)


def to_float(images: Tensor) -> Tensor:
    """Bytes 0..255 as float32 in [0, 1]."""
    return images.float().div_(255)


class ImageData(SplitLoaders):
    """Base of the image data modules: a subclass gives ``image_shape``, ``num_classes`` and ``read(split)``.

    Args:
        batch_size: images in a batch of one process.
        num_workers: processes that prepare batches. The default 0 is the fastest for images in memory: a whole batch
            costs about a millisecond, less than its way through a queue.
        seed: seed of the order, the augmentation and random splits.
        shift: most pixels that a training image moves by, in both directions, on zeros; 0 for none.
        flip: whether training images are mirrored left to right at random.
        label_noise: share of training and validation labels that are wrong, in [0, 1]. Which ones is fixed by the seed
            and the image's place in its split: the same for every epoch, worker and process. Test labels are clean.

    Raises:
        ValueError: an argument is out of range.
    """

    num_labels: int = 1
    """Classes in one image."""
    predict_split = "test"
    labelled: bool = True
    """Whether labels are known, and not all 0 for want of any."""
    class_names: list[str] | None = None
    """What the classes are called, where the data say so."""
    trained_names: list[str] | None = None
    """What the classes of the model's checkpoint are called, where it says so."""

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        shift: int = 0,
        flip: bool = False,
        label_noise: float = 0.0,
    ) -> None:
        super().__init__()
        must.check(
            locals(),
            batch_size=must.count,
            num_workers=must.whole(0),
            seed=must.seed,
            shift=must.whole(0),
            flip=must.flag,
            label_noise=must.number(0, 1, why="the share of wrong labels"),
        )
        self.batch_size, self.num_workers, self.seed, self.shift, self.flip = batch_size, num_workers, seed, shift, flip
        self.label_noise = label_noise
        self._splits: dict[str, LabelledImages | None] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image of a batch."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        raise NotImplementedError

    def read(self, split: str) -> LabelledImages | None:
        """Read ``"train"``, ``"val"`` or ``"test"``; ``None`` if the data have no such split."""
        raise NotImplementedError

    def images(self, split: str) -> LabelledImages | None:
        """The split as read, with noise on its labels if wanted; in memory after the first call."""
        if split not in self._splits:
            data = self.read(split)
            if data is not None and self.label_noise and split in _NOISE:
                labels = symmetric_noise(data.labels, self.label_noise, self.num_classes, self.seed, _NOISE[split])
                data = LabelledImages(data.pixels, labels)
            self._splits[split] = data
        return self._splits[split]

    def files(self, split: str) -> list[str] | None:
        """The file of each image of a split, where each has one."""
        return None

    def setup(self, stage: str) -> None:
        """Without validation images, train without validation."""
        if stage == "fit" and self.images("val") is None and self.trainer is not None:
            self.trainer.limit_val_batches = 0

    def require(self, split: str) -> LabelledImages:
        """The split, or one sentence if there is none."""
        data = self.images(split)
        if data is None:
            raise ValueError(f"{type(self).__name__} has no {split} images; set val_size above 0.")
        return data

    def dataset(self, split: str) -> Dataset:
        """What the loaders draw from; augmentation is for training only."""
        augment = {"shift": self.shift, "flip": self.flip} if split == "train" else {}
        return KeyedImages(self.require(split), self.seed, **augment)

    def _loader(self, split: str) -> KeyLoader:
        dataset = self.dataset(split)
        assert isinstance(dataset, Sized)  # torch's Dataset need not be; those of images are
        batches = KeyBatches(
            len(dataset),
            self.batch_size,
            seed=self.seed,
            **share_of_run(self.trainer, split),
        )
        return KeyLoader(dataset, batches, self.num_workers, trainer=self.trainer)
