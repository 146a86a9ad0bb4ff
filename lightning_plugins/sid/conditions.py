"""How many images a batch asks for and of what, and batches for training without data."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


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


def conditions(batch: Any, conditional: bool) -> tuple[int, Tensor | None, list[str] | None]:
    """How many samples a batch asks for, and of which classes or prompts.

    Args:
        batch: a dict with ``prompt``, a list of n texts; or ``label`` ``(n,)``; or any tensor of n rows.
        conditional: whether the teacher has classes; if not, labels are passed over.

    Returns:
        n, the labels ``(n,)`` or None, and the prompts or None.

    Raises:
        ValueError: no dict, or one without any of these.
    """
    values = batch if isinstance(batch, Mapping) else {}
    if (prompts := values.get("prompt")) is not None:
        return len(prompts), None, list(prompts)
    for value in values.values():
        if isinstance(value, Tensor):
            return len(value), values.get("label") if conditional else None, None
    found = f"one of {sorted(values)}" if values else f"a {type(batch).__name__}"
    raise ValueError(
        f"Batches are dicts with 'prompt' (a list of texts), 'label' or 'image', got {found}: SiD must know how many "
        "images to make."
    )


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
