"""Folders of pictures: which files are of which split and class is told by the names of folders alone."""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch.utilities import rank_zero_info

VALIDATION = ("validation", "valid", "val", "dev")
"""What a split for validation is called."""
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(VALIDATION, "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_ENDINGS = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".tga"}
_ENDINGS |= {".ppm", ".pgm", ".pbm", ".pnm"}
_TABLES = {"metadata.csv", "metadata.jsonl", "metadata.parquet"}  # of labels, which the library datasets reads itself


class Pictures(NamedTuple):
    """Patterns of files by split, whether these have folders of their own, and whether classes have."""

    files: dict[str, list[str]]
    splits: bool
    classes: bool


def find_pictures(folder: Path, classes: bool = True) -> Pictures | None:
    """The pictures of a folder, by ``train/``, ``validation/`` and ``test/`` if it has nothing else, and by class.

    The library ``datasets`` guesses splits from any folder's and file's name: a class called ``train``, or a picture
    ``val_1.png``, and it leaves out all others without a word.

    Args:
        folder: where they are.
        classes: whether classes are wanted; else pictures may lie anywhere below it.

    Returns:
        What ``load_dataset("imagefolder", data_files=...)`` takes; ``None`` where the folder holds no pictures, or a
        table that says more of them.

    Raises:
        ValueError: some pictures lie in a folder of a class, others above or below.
    """
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name)]
    has_splits = bool(names) and all(name.lower() in _SPLITS for name in names)
    splits: dict[str, list[Path]] = {} if has_splits else {"train": [folder]}
    for name in sorted(names) if has_splits else []:
        splits.setdefault(_SPLITS[name.lower()], []).append(folder / name)
    files: dict[str, list[str]] = {}
    depths: dict[int, Path] = {}
    left_out: Counter[str] = Counter()
    for split, roots in splits.items():
        found: dict[str, None] = {}
        for root in roots:
            for path in _files(root):
                ending = path.suffix.lower()
                if path.name in _TABLES:
                    return None
                if ending in _ENDINGS:
                    depths.setdefault(len(path.relative_to(root).parts), path)
                    found[f"{glob.escape(str(path.parent))}/*{glob.escape(path.suffix)}"] = None
                else:
                    left_out[ending or path.name] += 1
        if found:
            files[split] = list(found)
    if not files:
        return None
    if classes and (len(depths) > 1 or max(depths) > 2):
        example = depths[max(depths)] if max(depths) > 2 else depths[1]
        raise ValueError(
            f"{str(example)!r} lies in no folder of a class as others do: give one folder of images for each class, "
            "in train/ and test/ or not, or label_column='none' to do without classes."
        )
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        rank_zero_info(f"{str(folder)!r}: left out as no pictures of a known kind: {kinds}.")
    return Pictures(files, has_splits, classes and max(depths) == 2)


def _files(root: Path) -> Iterator[Path]:
    """All files but the hidden ones."""
    for folder, inner, names in os.walk(root, followlinks=False):
        inner[:] = sorted(name for name in inner if not _is_hidden(name))
        yield from (Path(folder, name) for name in sorted(names) if not _is_hidden(name))


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))
