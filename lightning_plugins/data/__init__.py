"""Data for every part of the package: images, text pairs, and what to draw.

**The batch of images.** All data modules of images give the same dict:

- ``"image"``: ``(B, C, H, W)`` float32 in [0, 1];
- ``"label"``: ``(B,)`` int64 class of each image.

``MultiMNIST`` has two classes in one image: ``"label"`` is ``(B, 2)`` int64, two different classes, and there is also

- ``"parts"``: ``(B, 2, C, H, W)`` float32, the two clean images in the order of the labels;
  ``"image"`` is their sum, clipped at one.

``image_shape``, ``num_classes`` and ``num_labels`` (classes in one image) are known as soon as a data module is made.

**The batch of texts** is described where it is made: :class:`KeyedText`. ``Seq2SeqData`` and ``PythonDocstrings`` give
it; their ``tokenizer`` is the one that data and model share.

**The batch of conditions**, of ``PromptData``, for models that learn without images: ``"label"`` as above, or

- ``"prompt"``: a list of B texts.

**Exactness.** The order, the augmentation, the partners and where running text is cut depend on (seed, epoch, sample)
alone: not on workers, batch arrangement or number of processes. A run resumed in mid-epoch sees the very batches it had
not yet seen. Add the ``RandomState`` callback if the model itself draws random numbers (dropout, noise).

Read in this order: ``loading.py`` (keys, and loaders that resume), ``images.py`` and ``digits.py`` (images, and the
shortest data module), ``text_data.py`` and ``text_pairs.py`` (texts).
"""

from lightning_plugins.data.digits import Digits
from lightning_plugins.data.docstrings import PythonDocstrings
from lightning_plugins.data.hf import HFImages
from lightning_plugins.data.idx import IdxImages
from lightning_plugins.data.images import ImageData, LabelledImages
from lightning_plugins.data.multimnist import MultiMNIST, box_overlap
from lightning_plugins.data.prompts import PromptData
from lightning_plugins.data.seq2seq import Seq2SeqData
from lightning_plugins.data.text_data import TextData
from lightning_plugins.data.text_pairs import KeyedText, Texts
from lightning_plugins.data.wordpiece import train_wordpiece

__all__ = [
    "Digits",
    "HFImages",
    "IdxImages",
    "ImageData",
    "KeyedText",
    "LabelledImages",
    "MultiMNIST",
    "PromptData",
    "PythonDocstrings",
    "Seq2SeqData",
    "TextData",
    "Texts",
    "box_overlap",
    "train_wordpiece",
]
