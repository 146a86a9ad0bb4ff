"""Any set of images that Hugging Face ``datasets`` reads, with a class for each or without."""

import io
import math
import os
import struct
import zipfile
from collections.abc import Container
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.core.pretrained import reason_of
from lightning_plugins.data.images import ImageData, LabelledImages, Pixels
from lightning_plugins.data.loading import VAL_SIZE, random_split, stratified_split
from lightning_plugins.data.picture_folders import VALIDATION, find_pictures

if TYPE_CHECKING:
    import datasets
    from PIL.Image import Image

_NO_LABELS = "none"
_LABELS = {"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))}  # types of labels
_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk() writes
_EVERYTHING = "everything"  # the split of a set without splits, for prediction
# What Pillow opens: others are read by programs of their own, as PostScript is, which is a program itself.
_FORMATS = {"PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA"}
_MOST_NAMES = 10  # that a sentence tells
_IN_MEMORY = 2**30  # bytes of a decoded split up to which it is held in memory


def load_splits(
    owner: str, path: str, name: str | None, train_split: str, folder: str, classes: bool | None = None
) -> "datasets.DatasetDict":
    """All splits of an id of the Hub, a folder, or a parquet file, which is a training split.

    Args:
        owner: name of the data module, for the error's sentence.
        path: id, folder or file; ``~`` is the home folder. A folder may be one that ``save_to_disk`` wrote.
        name: configuration of the data set, for ids that have several.
        train_split: name of the split that a parquet file, or a folder without splits, becomes.
        folder: what a folder should hold, for the error's sentence.
        classes: whether folders of pictures are classes; ``None`` where no pictures are looked for.

    Raises:
        FileNotFoundError: nothing readable there.
        ValueError: see :func:`find_pictures`.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    place = str(Path(path).expanduser())
    is_folder = Path(place).is_dir()
    pictures = find_pictures(Path(place).absolute(), classes) if is_folder and classes is not None else None
    try:
        if place.endswith(".parquet") and not is_folder:
            return datasets.load_dataset("parquet", data_files={train_split: place})
        if is_folder and any((Path(place) / file).is_file() for file in _SAVED):
            return _saved(place, train_split)
        if pictures is not None:
            files = pictures.files if pictures.splits else {train_split: pictures.files["train"]}
            return datasets.load_dataset("imagefolder", data_files=files, drop_labels=not pictures.classes)
        return datasets.load_dataset(place, name)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: a script
        raise FileNotFoundError(
            f"{owner} cannot read path={path!r}: {reason_of(error)}. Give a dataset id of the Hub (its first use "
            f"needs the network), {folder}, or a parquet file."
        ) from error


def _saved(place: str, train_split: str) -> "datasets.DatasetDict":
    """What ``save_to_disk`` wrote; its files may be anyone's, and say what is built of them.

    Raises:
        ValueError: they are not of that form.
    """
    import datasets

    try:
        found = datasets.load_from_disk(place)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"it is not as save_to_disk() writes it ({type(error).__name__}: {error})") from error
    splits = found if isinstance(found, datasets.DatasetDict) else datasets.DatasetDict({train_split: found})
    return splits.with_format(None)


def find_validation(splits: Container[Any]) -> str | None:
    """The split that goes by one of the usual names of validation."""
    return next((name for name in VALIDATION if name in splits), None)


class HFImages(ImageData):
    """Images from the Hub (ylecun/mnist, uoft-cs/cifar10, ...), a local folder or a parquet file.

    Images are decoded and resized once and kept in datasets' cache on disk; a split up to 1 GiB is then held in memory,
    a larger one is read from the disk batch by batch (give it workers).

    Args:
        path: a dataset id of the Hub; a folder with one folder of images for each class, in train/ and test/ if it has
            both, or of images alone if label_column is none; a folder of parquet files, or one that save_to_disk()
            wrote; or one parquet file. What has no splits is split by val_size and test_size, and predicted as a whole.
        name: configuration of the data set, for ids that have several.
        image_column: name of the column with the images. Default: the only one that holds images.
        label_column: name of the column with the labels. Default: the only one of class labels, or of integers if there
            is none. The word none takes images without classes, for models that need none: every label is then 0 and
            there is one class.
        train_split: name of the training split.
        val_split: name of the validation split. Default: validation, valid, val or dev if there is one, else val_size
            of the training images.
        test_split: name of the test split. Default: test if there is one, else test_size of the training images.
        val_size: training images held out at random, by the seed, where there is no validation split: a count, or a
            fraction if a float; 0 for none, there is no validation then. Each class has its share of them where there
            is no test split either.
        image_size: side in pixels of the square that images are resized to (the middle of a longer side is kept).
            Default: as they are, and all must be equal.
        channels: number of channels, 1 for grey or 3 for colour. Default: as in the first training image.
        batch_size: images in a batch of one process.
        num_workers: processes that prepare batches; 0 is the fastest for images in memory.
        seed: seed of the order, the augmentation and the validation images.
        shift: most pixels that a training image moves by, in both directions, on zeros; the usual "crop 32, padding 4"
            is a shift of 4.
        flip: whether training images are mirrored left to right at random.
        crop: side in pixels of the square in the middle that is kept, before it is resized; 140 is the custom for
            CelebA (178 x 218). Default: all of the image.
        test_size: training images held out at random, by the seed, as test images, of each class its share, where there
            is no test split: a count, or a fraction if a float; 0 for none.

    Raises:
        FileNotFoundError: nothing readable at ``path`` (when data are first asked for).
        ValueError: a split or column is missing or ambiguous, images differ in size or are smaller than ``crop``, or
            labels are not 0..K-1.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_size: int | float = 0.1,
        image_size: int | None = None,
        channels: int | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        shift: int = 0,
        flip: bool = False,
        crop: int | None = None,
        test_size: int | float = 0.1,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, shift, flip)
        names = ("name", "image_column", "label_column", "val_split", "test_split")
        words = dict.fromkeys(names, must.optional(must.word))
        must.check(
            locals(),
            path=must.path,
            **words,
            train_split=must.word,
            val_size=VAL_SIZE,
            test_size=VAL_SIZE,
            image_size=must.optional(must.count),
            crop=must.optional(must.count),
            channels=must.optional(must.one_of([1, 3], why="1 is grey, 3 colour")),
        )
        self.path, self.name, self.val_size, self.test_size = path, name, val_size, test_size
        self.image_column, self.label_column = image_column, label_column
        self.split_names = {"train": train_split, "val": val_split, "test": test_split}
        self.image_size, self.crop, self.channels = image_size, crop, channels

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:  # type: ignore[override]
        """``(C, H, W)`` by the arguments, else as the first training image."""
        first = _opened(self._rows("train")[0][self._columns[0]], f"{self.path}, train row 0")
        channels = self.channels or (1 if first.mode in ("1", "L") else 3)
        side = self.image_size or self.crop
        width, height = (side, side) if side else first.size
        if self.image_size and self.crop is None and first.size != (width, height):
            rank_zero_info(
                f"HFImages: image_size={side} makes {side} x {side} pixels of each image; the first one of "
                f"{self.path!r} has {first.width} x {first.height}."
            )
        return channels, height, width

    @cached_property
    def num_classes(self) -> int:  # type: ignore[override]
        """Classes named by the set; of plain integers, one more than the largest training label; 1 without labels."""
        if self._columns[1] is None:
            return 1
        feature = self._split("train").features[self._columns[1]]
        return getattr(feature, "num_classes", None) or max(self._split("train")[self._columns[1]]) + 1

    @property
    def class_names(self) -> list[str] | None:
        """What the classes are called, where the set says so."""
        column = self._columns[1]
        names = None if column is None else getattr(self._split("train").features[column], "names", None)
        return None if names is None else list(names)

    @property
    def labelled(self) -> bool:  # type: ignore[override]
        """Whether labels are the set's own."""
        return self._columns[1] is not None

    @property
    def predict_split(self) -> str:  # type: ignore[override]
        """The test split; all images of a set that has none."""
        return "test" if self._has("test") else _EVERYTHING

    def state_dict(self) -> dict[str, Any]:
        """The names of the classes, for the checkpoint."""
        return {"class_names": self.class_names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the classes with those that the model was trained on; predictions are called by the latter.

        Raises:
            ValueError: they have other names, so that a label would mean something else.
        """
        names = state.get("class_names")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return  # of another version, or without
        self.trained_names = names
        predicts = self.trainer is not None and self.trainer.predicting
        if not predicts and self.class_names not in (None, names):
            raise ValueError(
                f"The classes of {self.path!r} are {_list_of(self.class_names)}, but the model was trained on "
                f"{_list_of(names)}: give folders of these names, or label_column='none'."
            )

    def prepare_data(self) -> None:
        """Download and decode once, in one process; the others find the cache."""
        for split in self.split_names:
            if split == "train" or self._has(split):
                self._decoded(split)

    def read(self, split: str) -> LabelledImages | None:
        """One split, decoded."""
        own = split == _EVERYTHING or (self._has(split) and not (split == "train" and self._carved))
        rows = self._decoded("train" if split == _EVERYTHING or not self._has(split) else split)
        if not own:
            index = self._carved.get(split)
            if index is None or not len(index):
                return None
            rows = rows.select(index.tolist())
        labels = torch.tensor(rows["label"][:], dtype=torch.int64)
        if int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"The {split} labels of {self.path!r} run from {int(labels.min())} to {int(labels.max())}, but must be "
                f"0 to {self.num_classes - 1}: negative ones are hidden, name another split."
            )
        pixels: Pixels = ImagesOnDisk(rows, self.image_shape)
        if math.prod(pixels.shape) <= _IN_MEMORY:
            pixels = pixels[torch.arange(len(rows))]
        return LabelledImages(pixels, labels)

    def files(self, split: str) -> list[str] | None:
        """Where each image of a split lies, from the folder on; ``None`` where they are rows of a table."""
        rows = self._decoded("train" if split == _EVERYTHING or not self._has(split) else split)
        names = list(rows["file"])
        if split != _EVERYTHING and split in self._carved:
            names = [names[i] for i in self._carved[split].tolist()]
        return names if all(names) else None

    def require(self, split: str) -> LabelledImages:
        """The split, or one sentence if there is none."""
        data = self.images(split)
        if data is None:
            raise ValueError(f"HFImages has no {split} images; set {split}_size above 0.")
        return data

    @cached_property
    def _carved(self) -> dict[str, Tensor]:
        """Indices of the training split, where others are held out of it."""
        wanted = {"val": self.val_size, "test": self.test_size}
        sizes = {split: size for split, size in wanted.items() if not self._has(split)}
        if not sizes:
            return {}
        labels = torch.tensor(self._decoded("train")["label"][:], dtype=torch.int64)
        if "test" not in sizes:  # of a published set: as it has always been
            train, val = random_split(len(labels), self.val_size, self.seed)
            return {"train": train, "val": val}
        parts = stratified_split(labels, sizes, self.seed)
        held = " and ".join(f"{len(parts[split])} for {split} ({split}_size={sizes[split]})" for split in sizes)
        rank_zero_info(f"HFImages: {self.path!r} has no test split: of {len(labels)} images {held} are held out.")
        return parts

    @cached_property
    def _raw(self) -> "datasets.DatasetDict":
        return load_splits(
            "HFImages",
            self.path,
            self.name,
            self.split_names["train"],
            "a folder with one folder of images for each class",
            classes=self.label_column != _NO_LABELS,
        )

    def _has(self, split: str) -> bool:
        """Find the split's name; one that the user gave must exist."""
        if split == _EVERYTHING:
            return False
        if split == "val" and self.split_names["val"] is None:
            self.split_names["val"] = find_validation(self._raw)
        if split == "test" and self.split_names["test"] is None and "test" in self._raw:
            self.split_names["test"] = "test"
        return self.split_names[split] is not None

    def _split(self, split: str) -> "datasets.Dataset":
        name = self.split_names[split]
        assert name is not None  # asked for where there is one
        if name not in self._raw:
            raise ValueError(f"{self.path!r} has no split {name!r}; its splits are {', '.join(map(str, self._raw))}.")
        if not len(self._raw[name]):
            raise ValueError(f"{self.path!r} has no rows in its split {name!r}: name another, or add some.")
        return self._raw[name]

    @cached_property
    def _columns(self) -> tuple[str, str | None]:
        """Names of the image and the label column; no name where labels are not wanted."""
        import datasets

        features = self._split("train").features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        integers = [
            name for name, feature in features.items() if getattr(feature, "dtype", "").startswith(("int", "uint"))
        ]
        image = self._choose("image_column", self.image_column, images)
        if self.label_column == _NO_LABELS:
            return image, None
        label = self._choose("label_column", self.label_column, labels or integers)
        if getattr(features[label], "dtype", "") not in _LABELS:
            raise ValueError(
                f"label_column={label!r} of {self.path!r} holds {features[label]}, not whole numbers from 0 on: give "
                f"another column, or {_NO_LABELS!r} to do without labels."
            )
        return image, label

    def _choose(self, argument: str, given: str | None, found: list[str]) -> str:
        columns = list(self._split("train").features)
        if given is not None and given in columns:
            return given
        if given is not None:
            raise ValueError(f"{argument}={given!r} is no column of {self.path!r}, which has {', '.join(columns)}.")
        if len(found) != 1:
            what = f"several candidates ({', '.join(found)})" if found else "no candidate"
            other = f", or {_NO_LABELS!r} to do without labels" if argument == "label_column" else ""
            raise ValueError(
                f"{self.path!r} has {what} for {argument}: choose one of its columns {', '.join(columns)}{other}."
            )
        return found[0]

    def _rows(self, split: str) -> "datasets.Dataset":
        """The wanted columns as they are stored: images as bytes or paths, so that a damaged one can be named."""
        import datasets

        rows = self._split(split).select_columns([column for column in self._columns if column is not None])
        return rows.cast_column(self._columns[0], datasets.Image(decode=False))

    def _decoded(self, split: str) -> "datasets.Dataset":
        """Rows of raw bytes and label; datasets finds them in its cache the second time."""
        import datasets

        image, label = self._columns
        rows = self._rows(split)
        sizes = {"shape": self.image_shape, "crop": self.crop, "fit": self.image_size}
        folder = str(Path(self.path).expanduser().absolute()) if Path(self.path).expanduser().is_dir() else ""
        return rows.map(
            _decode,
            # all of it is in the cache's key
            fn_kwargs={
                "image_column": image,
                "label_column": label,
                "origin": f"{self.path}, {split}",
                "folder": folder,
                **sizes,
            },
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=datasets.Features(
                {"pixels": datasets.Value("binary"), "label": datasets.Value("int64"), "file": datasets.Value("string")}
            ),
            desc=f"Decoding {split} images",
        )


def _decode(
    rows: dict[str, list[Any]],
    indices: list[int],
    image_column: str,
    label_column: str | None,
    origin: str,
    shape: tuple[int, int, int],
    crop: int | None,
    fit: int | None,
    folder: str,
) -> dict[str, list[Any]]:
    from PIL import Image, ImageOps

    channels, height, width = shape
    labels = [0] * len(indices) if label_column is None else rows[label_column]
    pixels: list[bytes] = []
    files: list[str] = []
    for index, stored, label in zip(indices, rows[image_column], labels, strict=True):
        place = f"{origin} row {index}"
        if label is None:
            raise ValueError(f"{place} has no label: fill or remove it, or give label_column='none'.")
        image = _opened(stored, place)
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"An image has mode {image.mode}, more than 8 bits per channel: convert it to 8 first ({place})."
            )
        if crop is not None:
            image = _crop_middle(image, crop)
        image = image.convert("L" if channels == 1 else "RGB")
        if fit is not None:
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        elif image.size != (width, height):
            raise ValueError(
                f"Images differ in size: {width} x {height} and {image.width} x {image.height} px; give image_size."
            )
        array = np.asarray(image).reshape(height, width, channels)
        pixels.append(array.transpose(2, 0, 1).tobytes())
        path = "" if stored["bytes"] is not None else stored["path"]
        files.append(os.path.relpath(path, folder) if folder and path.startswith(os.path.join(folder, "")) else path)
    return {"pixels": pixels, "label": labels, "file": files}


def _opened(stored: dict[str, Any] | None, place: str) -> "Image":
    """The image of a row, decoded.

    Raises:
        ValueError: it is missing or damaged; the sentence has its file's name, or its row's number.
    """
    from PIL import Image, ImageOps

    if stored is None:
        raise ValueError(f"{place} has no image: fill or remove it.")
    try:
        Image.init()
        with Image.open(io.BytesIO(_content(stored)), formats=sorted(_FORMATS & Image.OPEN.keys())) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, struct.error, Image.DecompressionBombError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        reason = "it is of no known format" if isinstance(error, Image.UnidentifiedImageError) else reason
        name = f"{place} ({stored['path']})" if stored.get("path") else place
        raise ValueError(f"{name} cannot be read as an image: {reason}. Replace or remove it.") from error


def _content(stored: dict[str, Any]) -> bytes:
    """The bytes of an image: in the row, in a file of this machine, or in a zip archive of it; from no address."""
    if stored["bytes"] is not None:
        return stored["bytes"]
    inner, _, archive = stored["path"].partition("::")
    if archive and inner.startswith("zip://") and Path(archive).is_file():
        with zipfile.ZipFile(archive) as files:
            return files.read(inner.removeprefix("zip://"))
    if not Path(stored["path"]).is_file():
        raise FileNotFoundError("it is no file on this machine")
    return Path(stored["path"]).read_bytes()


def _list_of(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if names[_MOST_NAMES:] else "")


def _crop_middle(image: "Image", side: int) -> "Image":
    if side > min(image.size):
        raise ValueError(
            f"An image has {image.width} x {image.height} px, less than crop={side}: give a smaller one, or null."
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


class ImagesOnDisk:
    """Decoded images that stay in datasets' cache file; acts like a uint8 tensor ``(N, C, H, W)`` when gathered.

    Args:
        rows: with a column ``pixels`` of C·H·W bytes each.
        image_shape: ``(C, H, W)``.
    """

    def __init__(self, rows: "datasets.Dataset", image_shape: tuple[int, int, int]) -> None:
        self.rows, self.shape = rows, (len(rows), *image_shape)

    def __getitem__(self, index: Tensor) -> Tensor:
        content = bytearray(b"".join(self.rows[index.tolist()]["pixels"]))
        return torch.frombuffer(content, dtype=torch.uint8).view(-1, *self.shape[1:])
