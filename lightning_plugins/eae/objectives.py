r"""What each model adds to the reconstruction error: one term of the codes, and its weight.

.. math:: L = \frac1B \sum_i \mathrm{error}(x_i, D(z_i)) + w \, R(z), \qquad R = -\hat H(z) \text{ for EAE}

Shapes: n images of a process, N of all, d latent dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.core.random_numbers import randn
from lightning_plugins.eae.entropy import conditional_knn_entropy, knn_entropy
from lightning_plugins.eae.gaussianity import mmd, sigreg
from lightning_plugins.eae.nearest_neighbours import class_sizes

ObjectiveName = Literal["eae", "ae", "ae_bn", "rae_l2", "vae", "wae", "sigreg", "mmd"]
Reconstruction = Literal["mse", "bce", "l1"]


class Codes(NamedTuple):
    """What the encoder made of a batch.

    ``own`` ``(n, d)`` is what the decoder reads; ``all`` ``(N, d)`` are the codes of all processes with gradient, and
    ``labels`` ``(N,)`` their classes where the term is that within classes. A VAE draws ``own`` from its posterior,
    whose divergence from N(0, I) is ``divergence`` ``(n,)`` in nats; its ``all`` are the means.
    """

    own: Tensor
    all: Tensor
    divergence: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    r"""One model: whether codes are batch-normalised, the term beside the reconstruction, and its usual weight.

    ``decoder_decay`` is the coefficient of :math:`\|\theta\|^2 / 2` of the decoder's kernels.
    """

    batch_norm: bool
    term: Literal["none", "entropy", "divergence", "norm", "sigreg", "mmd"]
    weight: float
    decoder_decay: float = 0.0

    @property
    def draws(self) -> bool:
        """Whether the term needs random numbers: slices of the codes, or draws from N(0, I)."""
        return self.term in ("sigreg", "mmd")


OBJECTIVES: dict[str, Objective] = {
    # Neither the paper's weight nor its code is to be had: the best on MNIST, benchmarks/RESULTS.md.
    "eae": Objective(True, "entropy", 3.0),
    "ae": Objective(False, "none", 0.0),
    "ae_bn": Objective(True, "none", 0.0),
    # The RAE code's MNIST: 1e-4 mean(z^2) and 1e-7 |w|^2 beside the mean squared error of 1,024 pixels, d = 16.
    "rae_l2": Objective(False, "norm", 1.28e-2, decoder_decay=2.05e-4),
    "vae": Objective(False, "divergence", 1.0),
    "wae": Objective(False, "mmd", 200.0),  # the code minimises 0.05 times the squared error and 10 times MMD
    "sigreg": Objective(True, "sigreg", 10.0),
    "mmd": Objective(True, "mmd", 100.0),
}


def regularization(
    objective: Objective, codes: Codes, k: int | Sequence[int], generator: torch.Generator | None = None
) -> Tensor:
    r"""The term R to be minimised beside the reconstruction error, before its weight; a scalar, per sample.

    ``entropy``: :math:`-H(z)` in nats, or :math:`-H(z \mid y)` where the classes are known. ``divergence``: the VAE's
    KL divergence in nats. ``norm``: :math:`\|z\|^2 / 2` (Ghosh et al. 2020, eq. 6). ``sigreg``, ``mmd``: distance of
    the codes from N(0, I), whatever their classes.

    Args:
        objective: the model whose term is meant.
        codes: what the encoder made of the batch.
        k: neighbours of the entropy's estimate.
        generator: source of random slices and draws, the same on every process; for objectives that draw.
    """
    if objective.term == "entropy":
        if codes.labels is None:
            return -knn_entropy(codes.all, k)
        return -conditional_knn_entropy(codes.all, codes.labels, k)
    if objective.term == "divergence":
        assert codes.divergence is not None
        return codes.divergence.mean()
    if objective.term == "norm":
        return codes.own.square().sum(1).mean() / 2
    return {"sigreg": sigreg, "mmd": mmd}[objective.term](codes.all, generator=generator)


def reconstruction_error(reconstruction: Tensor, images: Tensor, kind: Reconstruction) -> Tensor:
    """``(B,)`` error of each image, summed over its pixels and channels.

    Args:
        reconstruction: ``(B, C, H, W)`` in [0, 1].
        images: ``(B, C, H, W)`` in [0, 1].
        kind: ``mse`` for the squared error, ``l1`` for the absolute one, ``bce`` for the cross entropy in nats (its
            least value is the images' own entropy, not 0).
    """
    reconstruction, images = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (reconstruction, images))
    if kind == "bce":
        with torch.autocast(images.device.type, enabled=False):  # refuses to run there, though its input is float32
            return F.binary_cross_entropy(reconstruction, images, reduction="none").flatten(1).sum(1)
    difference = reconstruction - images
    return (difference.abs() if kind == "l1" else difference.square()).flatten(1).sum(1)


def draw_posterior(h: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Codes of a VAE, drawn from its posteriors :math:`N(\mu, \sigma^2)`, whose divergence from N(0, I) is KL.

    .. math:: z = \mu + \sigma \epsilon, \qquad KL = \tfrac12 \sum_j \mu_j^2 + \sigma_j^2 - 1 - \log \sigma_j^2

    Args:
        h: ``(n, 2 d)``, means and, behind them, logarithms of variances.
        generator: source of the noise, on the device of ``h``; None takes the means themselves.

    Returns:
        Codes ``(n, d)``, means ``(n, d)`` and divergences ``(n,)`` in nats.

    Source: Kingma & Welling 2014 (arXiv 1312.6114), section 2.4 and appendix B.
    """
    mean, log_variance = h.chunk(2, dim=1)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
    if generator is None:
        return mean, mean, divergence
    noise = randn(mean.shape, generator, h.device, h.dtype)
    return mean + (log_variance / 2).exp() * noise, mean, divergence


def resolve_objective(name: str, weight: float | None) -> Objective:
    """The objective of that name, with a weight of the user's if it has a term to weigh.

    Args:
        name: one of the names in ``OBJECTIVES``.
        weight: factor of its term, 0 or more; None for the usual one.

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


def check_class_sizes(labels: Tensor, k: int | Sequence[int]) -> None:
    """Refuse a batch of which more than half has not k others of its class.

    Args:
        labels: ``(N,)`` classes of all processes' images.
        k: neighbours of the entropy's estimate.

    Raises:
        ValueError: the batch is such a one.
    """
    largest = k if isinstance(k, int) else max(k)
    counted = int((class_sizes(labels) > largest).sum())
    if 2 * counted < len(labels):
        raise ValueError(
            f"conditional=True takes the entropy within classes, but of {len(labels)} images of a batch only {counted} "
            f"have k={largest} others of their class: enlarge the batch."
        )
