"""What a batch may look like: pictures and texts in the form that the parts read, whichever way a loader gives them."""

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

PAIRS = '{"image": (B, C, H, W) floats in [0, 1], "label": (B,) int64} or (images, labels)'
TEXTS = '{"input_ids": (B, T) int64, "segment_ids": (B, T) int64}, as Seq2SeqData makes them'


def image_batch(batch: Any, owner: str, labels: bool = False) -> Mapping[str, Any]:
    """A batch as a dict with ``"image"`` and, where there are any, ``"label"``; a dict stays what it is.

    Args:
        batch: such a dict, ``(images, labels)`` or ``(images,)`` as a tuple or list, or images alone.
        owner: who reads it, for the sentence.
        labels: whether labels are read; int64 then, of whichever whole numbers they were.

    Raises:
        ValueError: it is of another form; the sentence says which form is asked for, and what came.
    """
    found = batch
    if isinstance(batch, Tensor):
        found = {"image": batch}
    elif isinstance(batch, list | tuple) and 1 <= len(batch) <= 2:
        found = dict(zip(("image", "label"), batch, strict=False))
    image = found.get("image") if isinstance(found, Mapping) else None
    if not isinstance(image, Tensor) or image.ndim != 4 or not image.is_floating_point():
        form = PAIRS if labels else f"{PAIRS}, or images alone"
        raise ValueError(f"{owner} takes batches {form}, got {_told(batch)}.")
    if not labels:
        return found
    label = found.get("label")
    if label is None:
        raise ValueError(f"{owner} reads labels: it takes batches {PAIRS}, got {_told(batch)}.")
    if not _is_whole(label):
        raise ValueError(f"{owner} takes labels (B,) int64, one or more for each image, got {_told(label)}.")
    return found if label.dtype == torch.int64 else {**found, "label": label.long()}


def warn_of_range(image: Tensor, owner: str) -> None:
    """Say it where values lie far outside [0, 1], as raw bytes and normalised images do; waits for the device.

    Half a unit beyond either end is let pass: resampling overshoots, and augmentations add noise.

    Args:
        image: the images of a batch.
        owner: who reads it, for the sentence.
    """
    if not image.numel():
        return
    least, most = (end.item() for end in image.detach().aminmax())
    if least < -_BEYOND or most > 1 + _BEYOND:
        cure = "divide by 255" if most > 2 and least >= 0 else "leave out the normalisation"
        rank_zero_warn(
            f"{owner} takes images in [0, 1], but the first batch has values from {least:.4g} to {most:.4g}: {cure}."
        )


_BEYOND = 0.5


def text_batch(batch: Any, owner: str) -> Mapping[str, Any]:
    """A batch of token rows, as it came.

    Args:
        batch: a dict with ``input_ids`` and ``segment_ids``, both ``(B, T)``.
        owner: who reads it, for the sentence.

    Raises:
        ValueError: it is of another form; the sentence says which form is asked for, and what came.
    """
    found = batch if isinstance(batch, Mapping) else {}
    ids, segments = found.get("input_ids"), found.get("segment_ids")
    if not (_is_whole(ids) and _is_whole(segments) and ids.ndim == 2 and ids.shape == segments.shape):
        raise ValueError(f"{owner} takes batches {TEXTS}, got {_told(batch)}.")
    return batch


def _is_whole(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of whole numbers."""
    return isinstance(value, Tensor) and value.dtype in _WHOLE


_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_SHOWN = 6  # parts of a batch that a sentence names


def _told(value: Any) -> str:
    """What came, in a few words: shapes and types."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        parts = [f"{name} {_told(part)}" for name, part in value.items()]
        return f"a dict with {_some(parts) or 'nothing in it'}"
    if isinstance(value, list | tuple):
        kind = type(value).__name__
        if value and all(isinstance(part, str) for part in value):
            return f"a {kind} of {len(value)} texts"
        return f"a {kind} of {len(value)}" + (f": {_some([_told(part) for part in value])}" if value else "")
    return f"a {type(value).__name__}"


def _some(parts: list[str]) -> str:
    return ", ".join(parts[:_SHOWN]) + (", ..." if parts[_SHOWN:] else "")
