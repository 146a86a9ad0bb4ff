"""The 1,797 handwritten digits that ship with the package."""

from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.core.random_numbers import hash_keys
from lightning_plugins.data.images import ImageData, LabelledImages

# of each class, in hash order: the first fifth is for testing, the next tenth for validation
_TEST, _VAL = 0.2, 0.1
_NUM_TRAIN = 1259
_CHOICE = -3  # stream of random numbers: the order in which num_train takes images


class Digits(ImageData):
    """1,797 real handwritten digits of 8 x 8 pixels, in the package: nothing is downloaded.

    The split is fixed, whatever the seed: of each class 70 % train (1,259), 10 % validate (179), 20 % test (359).

    Args:
        image_size: height and width in pixels, 8 or more. The 8 x 8 images are enlarged by bilinear interpolation, so
            that networks made for MNIST's 28 x 28 (the default) fit; 8 leaves them as they are. Pixels are rounded to
            1/255.
        batch_size: images in a batch of one process.
        num_workers: processes that prepare batches; 0 is the fastest here.
        seed: seed of the order, the augmentation and the wrong labels.
        shift: most pixels that a training image moves by, in both directions, on zeros. One pixel of the original is
            image_size / 8.
        label_noise: share r in [0, 1] of training and validation labels that are wrong, uniform over the nine other
            digits, so that r = 0.9 leaves no information. Fixed by the seed and the image; test labels are clean.
        num_train: number of images to train on, 1 to 1259: a random choice, the same whatever the seed, and part of
            every larger one. Default: all 1,259.

    Raises:
        ValueError: ``image_size`` below 8, ``batch_size`` below 1, a negative number, ``label_noise`` outside [0, 1],
            or ``num_train`` outside 1..1259.

    Source: Alpaydin and Kaynak 1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49 (CC BY 4.0).

    Example:
        >>> data = Digits(batch_size=64, shift=2)
        >>> data.image_shape, data.num_classes
        ((1, 28, 28), 10)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["image"].shape, batch["label"].shape
        (torch.Size([64, 1, 28, 28]), torch.Size([64]))
        >>> sum(len(batch["label"]) for batch in data.test_dataloader())
        359
    """

    def __init__(
        self,
        image_size: int = 28,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        shift: int = 0,
        label_noise: float = 0.0,
        num_train: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, shift, label_noise=label_noise)
        most = must.whole(1, _NUM_TRAIN, why="so many training images there are")
        must.check(locals(), image_size=must.whole(8), num_train=must.optional(most))
        self.image_size, self.num_train = image_size, num_train

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(1, image_size, image_size)``."""
        return 1, self.image_size, self.image_size

    @property
    def num_classes(self) -> int:
        """Ten digits."""
        return 10

    def read(self, split: str) -> LabelledImages:
        """One of the three fixed parts."""
        images, labels = embedded_digits()
        index = _split_indices(labels)[split]
        if split == "train" and self.num_train is not None:
            index = index[hash_keys(index, seed=0, stream=_CHOICE).argsort()[: self.num_train]].sort().values
        pixels = images[index, None].float() * (255 / 16)
        if self.image_size != 8:
            pixels = F.interpolate(pixels, size=self.image_size, mode="bilinear", align_corners=False)
        return LabelledImages(pixels.round().to(torch.uint8), labels[index])


def embedded_digits() -> tuple[Tensor, Tensor]:
    """All digits: ``(1797, 8, 8)`` uint8 in 0..16 and ``(1797,)`` int64 labels, in UCI's order."""
    with (files("lightning_plugins.data") / "embedded" / "digits.npz").open("rb") as file, np.load(file) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()


def _split_indices(labels: Tensor) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {"test": [], "val": [], "train": []}
    for digit in range(10):
        index = (labels == digit).nonzero()[:, 0]
        index = index[hash_keys(index, seed=0).argsort()]
        test, val = round(_TEST * len(index)), round(_VAL * len(index))
        for name, part in zip(parts, index.split([test, val, len(index) - test - val]), strict=True):
            parts[name].append(part)
    return {name: torch.cat(part).sort().values for name, part in parts.items()}
