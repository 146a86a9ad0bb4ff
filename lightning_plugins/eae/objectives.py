"""What each model adds to the reconstruction error. Shapes: n images of a process, N of all, d latent dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.eae.entropy import conditional_knn_entropy, knn_entropy
from lightning_plugins.eae.gaussianity import mmd, sigreg
from lightning_plugins.eae.nearest_neighbours import class_sizes

ObjectiveName = Literal["eae", "ae", "ae_bn", "rae_l2", "vae", "wae", "sigreg", "mmd"]
Reconstruction = Literal["mse", "bce", "l1"]


class Codes(NamedTuple):
    """What the encoder made of a batch.

    ``own`` ``(n, d)`` is what the decoder reads; ``all`` ``(N, d)`` are the codes of all processes with gradient, and
    ``labels`` ``(N,)`` their classes if the model is conditional. A VAE draws ``own`` from its posterior, whose
    divergence from N(0, I) is ``divergence`` ``(n,)`` in nats; its ``all`` are the means.
    """

    own: Tensor
    all: Tensor
    divergence: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    r"""One model: whether codes are batch-normalised, the term beside the reconstruction, and its usual weight.

    ``decoder_decay`` is the coefficient of :math:`\|\theta\|^2 / 2` of the decoder's weights.
    """

    batch_norm: bool
    term: Literal["none", "entropy", "divergence", "norm", "sigreg", "mmd"]
    weight: float
    decoder_decay: float = 0.0


OBJECTIVES: dict[str, Objective] = {
    # Neither the paper's weight nor its code is to be had: the best on MNIST, benchmarks/RESULTS.md.
    "eae": Objective(True, "entropy", 3.0),
    "ae": Objective(False, "none", 0.0),
    "ae_bn": Objective(True, "none", 0.0),
    # The RAE code's MNIST: 1e-4 mean(z^2) and 1e-7 |w|^2 beside the mean squared error of 1,024 pixels, d = 16.
    "rae_l2": Objective(False, "norm", 1.28e-2, decoder_decay=2.05e-4),
    "vae": Objective(False, "divergence", 1.0),
    "wae": Objective(False, "mmd", 10.0),
    "sigreg": Objective(True, "sigreg", 10.0),
    "mmd": Objective(True, "mmd", 100.0),
}


def resolve_objective(name: str, weight: float | None) -> Objective:
    """The objective called ``name``, with a weight of the user's if it has a term to weigh.

    Raises:
        ValueError: an unknown name, a negative weight, or a weight of nothing.
    """
    must.one_of(ObjectiveName)("objective", name)
    must.optional(must.number(0, why="the entropy is maximised by a positive one"))("weight", weight)
    objective = OBJECTIVES[name]
    if weight is None:
        return objective
    if objective.term == "none" and weight:
        raise ValueError(f"weight={weight} weighs nothing: objective={name!r} is the reconstruction error alone.")
    return replace(objective, weight=float(weight))


def reconstruction_error(reconstruction: Tensor, images: Tensor, kind: Reconstruction) -> Tensor:
    """``(B,)`` error of each image, summed over its pixels and channels.

    Args:
        reconstruction: ``(B, C, H, W)`` in [0, 1].
        images: ``(B, C, H, W)`` in [0, 1].
        kind: ``mse`` the squared error, ``l1`` the absolute one, ``bce`` the cross entropy in nats (its least value is
            the images' own entropy, not 0).
    """
    reconstruction, images = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (reconstruction, images))
    if kind == "bce":
        with torch.autocast(images.device.type, enabled=False):  # refuses to run there, though its input is float32
            return F.binary_cross_entropy(reconstruction, images, reduction="none").flatten(1).sum(1)
    difference = reconstruction - images
    return (difference.abs() if kind == "l1" else difference.square()).flatten(1).sum(1)


def check_class_sizes(labels: Tensor, k: int | Sequence[int]) -> None:
    """Refuse a batch of which more than half has not k others of its class.

    Raises:
        ValueError: so.
    """
    largest = k if isinstance(k, int) else max(k)
    counted = int((class_sizes(labels) > largest).sum())
    if 2 * counted < len(labels):
        raise ValueError(
            f"conditional=True takes the entropy within classes, but of {len(labels)} images of a batch only {counted} "
            f"have k={largest} others of their class: enlarge the batch."
        )


def regularization(objective: Objective, codes: Codes, k: int | Sequence[int], generator: torch.Generator) -> Tensor:
    r"""The term to be minimised beside the reconstruction error, before its weight; a scalar, per sample.

    ``entropy``: :math:`-H(z)` in nats, or :math:`-H(z \mid y)` where the classes are known. ``divergence``: the VAE's
    KL divergence in nats. ``norm``: :math:`\|z\|^2 / 2` (Ghosh et al. 2020, eq. 6). ``sigreg``, ``mmd``: distance of
    the codes from N(0, I), whatever their classes.

    Args:
        objective: which term.
        codes: of the batch.
        k: neighbours of the entropy's estimate.
        generator: of random slices and draws from N(0, I), the same on every process.
    """
    if objective.term == "entropy":
        return (
            -knn_entropy(codes.all, k) if codes.labels is None else -conditional_knn_entropy(codes.all, codes.labels, k)
        )
    if objective.term == "divergence":
        assert codes.divergence is not None
        return codes.divergence.mean()
    if objective.term == "norm":
        return codes.own.square().sum(1).mean() / 2
    return {"sigreg": sigreg, "mmd": mmd}[objective.term](codes.all, generator=generator)
