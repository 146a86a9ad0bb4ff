"""What all image data modules share: images in memory, augmentation of a whole batch, resumable loaders.

Shapes: N images of a split, B images of a batch, C channels, H height, W width.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from lightning_plugins.data.keys import KeyBatches, KeyLoader, random_integers

_SHIFT_Y, _SHIFT_X, _FLIP = range(3)  # streams of random numbers, one for each use


class Pixels(Protocol):
    """Images that can be gathered: a uint8 tensor ``(N, C, H, W)``, or something on disk that acts like one."""

    shape: tuple[int, ...]

    def __getitem__(self, index: Tensor) -> Tensor: ...


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
        data: the split.
        seed: of the augmentation.
        shift: each image moves by up to this many px in both directions; 0: not at all.
        flip: each image is mirrored left to right with probability one half.
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


def to_float(images: Tensor) -> Tensor:
    """Bytes 0..255 as float32 in [0, 1]."""
    return images.float().div_(255)


class ImageData(LightningDataModule):
    """Base of the image data modules: a subclass gives ``image_shape``, ``num_classes`` and ``read(split)``.

    Args:
        batch_size: images in a batch of one process.
        num_workers: processes that prepare batches. The default 0 is the fastest for images in memory: a whole batch
            costs about a millisecond, less than its way through a queue.
        seed: of the order, the augmentation and random splits.
        shift: training images move by up to this many px, on zeros.
        flip: training images are mirrored left to right at random.
    """

    num_labels: int = 1
    """Classes in one image."""

    def __init__(
        self, batch_size: int = 128, num_workers: int = 0, seed: int = 0, shift: int = 0, flip: bool = False
    ) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        at_least("num_workers", num_workers, 0)
        at_least("shift", shift, 0)
        self.batch_size, self.num_workers, self.seed, self.shift, self.flip = batch_size, num_workers, seed, shift, flip
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
        """The split as read, in memory after the first call."""
        if split not in self._splits:
            self._splits[split] = self.read(split)
        return self._splits[split]

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
        dataset, trainer = self.dataset(split), self.trainer
        share: dict[str, Any] = (trainer and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
        batches = KeyBatches(
            len(dataset),
            self.batch_size,
            train=split == "train"
            and not (trainer and trainer.overfit_batches),  # overfitting repeats the same batches
            seed=self.seed,
            world_size=share["num_replicas"],
            rank=share["rank"],
        )
        pin = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return KeyLoader(dataset, batches, self.num_workers, pin_memory=pin)

    def train_dataloader(self) -> KeyLoader:
        """Shuffled and augmented; the last incomplete batch of an epoch is dropped."""
        return self._loader("train")

    def val_dataloader(self) -> KeyLoader:
        """Every validation image once, in order."""
        return self._loader("val")

    def test_dataloader(self) -> KeyLoader:
        """Every test image once, in order."""
        return self._loader("test")

    def predict_dataloader(self) -> KeyLoader:
        """The test images."""
        return self._loader("test")


def at_least(name: str, value: int, minimum: int) -> None:
    """Refuse a number below its minimum with a sentence."""
    if value < minimum:
        raise ValueError(f"{name}={value} must be {minimum} or more.")
