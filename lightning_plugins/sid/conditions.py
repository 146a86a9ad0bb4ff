"""How many images a batch asks for and of what, and batches for training without data."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core.batches import image_batch

_COUNTED = ("label", "image", "index")  # of what a batch holds, tells how many images to make


class EqualBatches:
    """A loader of batches that only say how many images to make: ``{"index": (B,)}``.

    It has the two methods by which Lightning knows a loader that can be resumed within an epoch; as all batches are
    alike there is nothing to remember.

    Args:
        batch_size: number of images of one process in a batch, B.
        num_batches: number of batches in an epoch.
    """

    def __init__(self, batch_size: int, num_batches: int) -> None:
        self.batch_size, self.num_batches = batch_size, num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for _ in range(self.num_batches):
            yield {"index": torch.arange(self.batch_size)}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


def conditions(batch: Any, conditional: bool, owner: str = "SiD") -> tuple[int, Tensor | None, list[str] | None]:
    """How many samples a batch asks for, and of which classes or prompts.

    Args:
        batch: a dict with ``prompt``, a list of n texts; or with ``label`` ``(n,)``, ``image`` or ``index``; or images,
            alone or with labels, as :func:`image_batch` takes them.
        conditional: whether the teacher has classes; if not, labels are passed over.
        owner: who reads the batch, for the sentence.

    Returns:
        n, the labels ``(n,)`` or None, and the prompts or None.

    Raises:
        ValueError: a batch without any of these.
    """
    values = as_dict(batch, owner)
    if (prompts := values.get("prompt")) is not None:
        return len(prompts), None, list(prompts)
    for value in map(values.get, _COUNTED):
        if isinstance(value, Tensor):
            return len(value), values.get("label") if conditional else None, None
    raise ValueError(
        f"{owner} must know how many images to make: batches are dicts with 'prompt' (a list of texts), 'label' or "
        f"'image', or (images, labels), got one of {sorted(values)}."
    )


def as_dict(batch: Any, owner: str = "SiD") -> Mapping[str, Any]:
    """A batch that is no dict, of images alone or with labels, as one."""
    if isinstance(batch, Mapping):
        return batch
    return image_batch(batch, owner, labels=isinstance(batch, list | tuple) and len(batch) == 2)


def real_images(batch: Mapping[str, Any], description: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """A batch's images ``(n, C, H, W)`` in [-1, 1], for SiDA.

    Args:
        batch: a dict with ``image`` ``(n, C, H, W)`` in [0, 1], and ``label`` if the teacher has classes.
        description: what the networks are, :attr:`StudentNetworks.description`.
        dtype: floating type of the result.

    Raises:
        ValueError: there are none, or without classes, or of another shape than what the teacher makes.
    """
    if not description["in_pixels"]:
        raise ValueError("adversarial=True tells generated images from real ones, but this teacher makes latents.")
    if "image" not in batch:
        raise ValueError("adversarial=True tells generated images from real ones: give data with images.")
    if description["num_classes"] is not None and "label" not in batch:
        raise ValueError("adversarial=True tells images of each class apart: give data with labels for this teacher.")
    found, shape = tuple(batch["image"].shape[1:]), tuple(description["sample_shape"])
    if found != shape:
        raise ValueError(f"adversarial=True needs images of the teacher's shape, {shape}, got {found}.")
    return 2 * batch["image"].to(dtype) - 1
