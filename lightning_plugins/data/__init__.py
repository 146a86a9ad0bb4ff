"""Image data for every part of the package.

**The batch.** All data modules give the same dict:

- ``"image"``: ``(B, C, H, W)`` float32 in [0, 1];
- ``"label"``: ``(B,)`` int64 class of each image.

``MultiMNIST`` has two classes in one image: ``"label"`` is ``(B, 2)`` int64, two different classes, and there is also

- ``"parts"``: ``(B, 2, C, H, W)`` float32, the two clean images in the order of the labels;
  ``"image"`` is their sum, clipped at one.

``image_shape``, ``num_classes`` and ``num_labels`` (classes in one image) are known as soon as a data module is made.

**Exactness.** The order, the augmentation and the partners depend on (seed, epoch, sample) alone: not on workers,
batch arrangement or number of processes. A run resumed in mid-epoch sees the very batches it had not yet seen.
Add the ``RandomState`` callback if the model itself draws random numbers (dropout, noise).
"""

from lightning_plugins.data.digits import Digits
from lightning_plugins.data.hf import HFImages
from lightning_plugins.data.idx import IdxImages
from lightning_plugins.data.images import ImageData, LabelledImages
from lightning_plugins.data.multimnist import MultiMNIST, box_overlap

__all__ = ["Digits", "HFImages", "IdxImages", "ImageData", "LabelledImages", "MultiMNIST", "box_overlap"]
