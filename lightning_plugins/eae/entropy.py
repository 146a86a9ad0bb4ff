"""Entropy of codes from the distances to their nearest neighbours (Kozachenko-Leonenko), with gradient.

Shape letters: N codes, d their dimensions, K neighbours of each.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from lightning_plugins.core import arguments as must
from lightning_plugins.core.distributed import gather_rows
from lightning_plugins.eae.nearest_neighbours import class_sizes, nearest_neighbours


def knn_entropy(
    z: Tensor,
    k: int | Sequence[int] = 1,
    *,
    eps: float = 1e-6,
    chunk_size: int = 512,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Estimate the differential entropy of the distribution that the codes were drawn from.

    .. math::
        H = \psi(N) - \psi(k) + \log B_d + \frac{d}{2N} \sum_i \log(r_i^2 + \epsilon), \quad
        \log B_d = \tfrac{d}{2} \log \pi - \log \Gamma(\tfrac{d}{2} + 1),

    with r the Euclidean distance of a code to its k-th nearest other code. The neighbours are searched without
    gradient, in blocks; the distances of the chosen pairs are then taken exactly, with gradient of any order, and in
    float32 or wider also under autocast. Per code that gradient is at most ``d / (2 N sqrt(eps))`` for each pair it is
    in. A code and its exact copy get none from each other, since no direction leads apart: see
    :func:`count_duplicates`.

    The estimate is biased beyond some 8 dimensions (+9.5 nats for N = 512 normal codes with d = 64): compare it with
    :func:`gaussian_reference_entropy`, as :func:`entropy_gap` does. Micro-batches of gradient accumulation are
    estimated one by one, so that they do not count as a larger N.

    Args:
        z: ``(N, d)`` codes; any offset and floating type.
        k: which nearest neighbour the estimate takes, or several whose estimates are averaged. 1 in the EAE paper; more
            means less variance and more bias.
        eps: what is added to the squared distances, above 0. It is meant for codes of unit variance, and bounds the
            gradient without stopping close pairs, as a minimum would; it adds less than 0.01 nats unless codes are
            crowded in one or two dimensions.
        chunk_size: rows that are searched at once: the search holds ``chunk_size * N`` distances.
        group: processes whose codes count together, in the order of ranks, such as
            ``torch.distributed.group.WORLD``; every one gets the same value, and DDP's mean of the gradients is that of
            one process with all codes. None: this process's codes alone. What makes a code depend on the batch
            belongs after the gathering: gather first, normalise, then call this without a group.

    Returns:
        Scalar in nats; float32, or float64 for float64 codes.

    Raises:
        ValueError: not more codes than k, or an argument out of range.

    Source: Kozachenko & Leonenko 1987; Ghose, Rashwan & Poupart 2020 (arXiv 2002.10631).
    """
    check_options(k, eps, chunk_size)
    must.codes("z", z)
    columns = several(k)
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if group is not None:
            z, _ = gather_rows(z, group)
        num_codes, dim = z.shape
        log_squares = _log_squares(z, nearest_neighbours(z, max(columns), chunk_size), columns, eps).mean()
        return dim / 2 * log_squares + (_digamma(num_codes) + _constants(dim, columns))


def conditional_knn_entropy(
    z: Tensor,
    labels: Tensor,
    k: int | Sequence[int] = 1,
    *,
    eps: float = 1e-6,
    chunk_size: int = 512,
) -> Tensor:
    r"""Estimate the entropy of codes whose class is known: a code's neighbours are those of its class.

    .. math:: H(z \mid y) = \sum_c \frac{N_c}{N} H(z \mid y = c),

    with the estimate of :func:`knn_entropy` for each class. The true H(z | y) is at most H(z), and equal to it only if
    the codes tell nothing of the class: among codes of mean 0 and variance 1 it is largest if every class is N(0, I).
    H(z) does not ask for that: classes may fill regions of their own. The estimates do not compare, as the bias of
    small classes is larger than that of all codes.

    Args:
        z: ``(N, d)`` codes, of all processes where there are several.
        labels: ``(N,)`` integers, the codes' classes. Those with k codes or fewer are left out.
        k: which nearest neighbour the estimate takes, or several whose estimates are averaged.
        eps: what is added to the squared distances, above 0.
        chunk_size: rows that are searched at once: the search holds ``chunk_size * N`` distances.

    Returns:
        Scalar in nats; float32, or float64 for float64 codes. 0 without gradient if all classes are left out.

    Raises:
        ValueError: not more codes than k, other shapes, or an argument out of range.

    Example:
        >>> z = torch.eye(4).repeat(2, 1)
        >>> labels = torch.arange(8) // 4
        >>> (conditional_knn_entropy(z, labels) - knn_entropy(torch.eye(4))).abs().item() < 1e-6
        True
    """
    check_options(k, eps, chunk_size)
    must.codes("z", z)
    columns = several(k)
    must.tensor(dtype="any")("labels", labels)
    if labels.shape != z.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be ({len(z)},) integers, got {tuple(labels.shape)} {labels.dtype}.")
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        counts = class_sizes(labels)
        counted = counts > max(columns)
        log_squares = _log_squares(z, nearest_neighbours(z, max(columns), chunk_size, labels), columns, eps).mean(1)
        entropies = z.shape[1] / 2 * log_squares + torch.digamma(counts.to(z)) + _constants(z.shape[1], columns)
        return torch.where(counted, entropies, 0.0).sum() / counted.sum().clamp_min(1)


def koleo_loss(z: Tensor, *, eps: float = 1e-8, group: ProcessGroup | None = None) -> Tensor:
    r"""Spread codes over the sphere: the KoLeo loss, as DINOv2 trains with it.

    .. math:: L = -\frac1N \sum_i \log(\| u_i - u_j + \epsilon \| + \epsilon), \quad u = z / \|z\|,

    with j the nearest other code. Up to constants it is minus the entropy on the sphere, divided by d: a weight of
    0.1 here (DINOv2's) is 0.1 / d in front of :func:`knn_entropy`. It may be negative. Its gradient is bounded by
    1 / eps only; :func:`knn_entropy` is the gentler one for close pairs.

    Args:
        z: ``(N, d)`` codes, not zero; half precision is widened, also under autocast.
        eps: what is added to differences and distances, above 0; 1e-8 in DINOv2.
        group: processes whose codes count together, as for :func:`knn_entropy`. None: this process's alone, as in
            DINOv2.

    Returns:
        Scalar; float32, or float64 for float64 codes.

    Raises:
        ValueError: a single code, or an argument out of range.

    Source: Sablayrolles et al. 2019 (arXiv 1806.03198) eq. 4; Oquab et al. 2023 (DINOv2).
    """
    _EPS("eps", eps)
    must.codes("z", z)
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if group is not None:
            z, _ = gather_rows(z, group)
        u = F.normalize(z, eps=eps)
        others = u.index_select(0, nearest_neighbours(u)[:, 0])
        return -F.pairwise_distance(u, others, eps=eps).add(eps).log().mean()


@torch.no_grad()
def count_duplicates(z: Tensor) -> Tensor:
    """Count the codes that are exact copies of an earlier one, as a scalar int64 tensor; a GPU is waited for.

    Args:
        z: ``(N, d)`` codes, as they came: half precision makes copies of what was close.

    Raises:
        ValueError: codes of another shape.

    Example:
        >>> count_duplicates(torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])).item()
        2
    """
    must.codes("z", z)
    return torch.tensor(len(z) - len(torch.unique(z, dim=0)), device=z.device)


def gaussian_reference_entropy(
    num_samples: int,
    dim: int,
    k: int | Sequence[int] = 1,
    *,
    num_draws: int | None = None,
    seed: int = 0,
) -> float:
    r"""Mean of :func:`knn_entropy` over normal codes: what N batch-normalised codes score that are truly Gaussian.

    The true entropy is ``d / 2 * log(2 pi e)``; the estimator's bias is large for small N and large d, and its known
    asymptotic formula has even the wrong sign there, so it is simulated. Draws are normalised per dimension, as codes
    after a batch norm are, which also halves the noise.

    Args:
        num_samples: number of codes N, more than k.
        dim: dimensions d of a code.
        k: which nearest neighbour the estimate takes, or several whose estimates are averaged.
        num_draws: how many sets of N codes. None: as many as make 2 ** 15 codes together, at least one, for a standard
            error of 0.01 nats at d = 16 and 0.03 at d = 64.
        seed: number that starts a generator of the simulation's own, on the CPU: the result is the same everywhere.

    Returns:
        Nats, remembered for the life of the process.

    Raises:
        ValueError: an argument is out of range, or not more samples than k.

    Example:
        >>> round(gaussian_reference_entropy(512, 64) - 64 / 2 * math.log(2 * math.pi * math.e), 1)
        9.5
    """
    NEIGHBOURS("k", k)
    sizes = {"num_samples": more_than(k), "dim": must.count, "num_draws": must.optional(must.count)}
    must.check(locals(), **sizes, seed=must.seed)
    return _simulated_entropy(num_samples, dim, tuple(several(k)), num_draws or -(-(2**15) // num_samples), seed)


@functools.lru_cache(maxsize=256)
@torch.no_grad()
def _simulated_entropy(num_samples: int, dim: int, k: tuple[int, ...], num_draws: int, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(num_draws):
        z = torch.randn(num_samples, dim, generator=generator, device="cpu", dtype=torch.float32)
        total += knn_entropy((z - z.mean(0)) / z.std(0, correction=0), k).item()
    return total / num_draws


def entropy_gap(z: Tensor, k: int | Sequence[int] = 1) -> Tensor:
    """Entropy of codes minus that of as many Gaussian ones: 0 for normal codes, below for what is less spread.

    Args:
        z: ``(N, d)`` codes, normalised per dimension.
        k: which nearest neighbour the estimate takes, or several whose estimates are averaged.

    Returns:
        Scalar in nats. Above 0 codes are spread more evenly than random ones, as after maximising the entropy.

    Raises:
        ValueError: not more codes than k, or of another shape.
    """
    return knn_entropy(z, k) - gaussian_reference_entropy(len(z), z.shape[1], k)


class KNNEntropyLoss(nn.Module):
    """Minus :func:`knn_entropy`, for any network's codes; pair it with something that bounds their scale.

    Args:
        k: which nearest neighbour the estimate takes, or several whose estimates are averaged; 1 in the EAE paper.
        eps: what is added to the squared distances, above 0, so that equal codes have a gradient; 1e-6 is meant for
            codes of unit variance.
        chunk_size: rows that are searched at once; the search holds chunk_size times N distances for N codes.
        all_ranks: whether all processes' codes count together, where there are several.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> KNNEntropyLoss(k=[1, 2, 3])(torch.eye(4)).item()  # all distances are sqrt(2)
        -3.98...
    """

    def __init__(
        self, k: int | Sequence[int] = 1, eps: float = 1e-6, chunk_size: int = 512, all_ranks: bool = True
    ) -> None:
        super().__init__()
        check_options(k, eps, chunk_size)
        must.flag("all_ranks", all_ranks)
        self.k, self.eps, self.chunk_size, self.all_ranks = k, eps, chunk_size, all_ranks

    def forward(self, z: Tensor) -> Tensor:
        """``(N, d)`` codes to a scalar."""
        distributed = torch.distributed
        group = distributed.group.WORLD if self.all_ranks and distributed.is_available() else None
        return -knn_entropy(z, self.k, eps=self.eps, chunk_size=self.chunk_size, group=group)


NEIGHBOURS = must.several(must.count, why="the nearest other code is k=1")
_EPS = must.number(above=0, why="without it two equal codes give NaN gradients")
_CHUNK_SIZE = must.whole(1, why="512 suits most machines")


def several(k: int | Sequence[int]) -> list[int]:
    """The neighbours asked for, as a list, whether k is one or several."""
    return list(k) if isinstance(k, Sequence) else [k]


def more_than(k: int | Sequence[int]) -> must.Rule:
    """The rule for a number of codes of which each is to have its k nearest neighbours."""
    largest = max(several(k))
    return must.whole(largest + 1, why=f"k={largest} neighbours need more than {largest} codes")


def check_options(k: int | Sequence[int], eps: float, chunk_size: int) -> None:
    """Raise a ValueError unless all are valid."""
    must.check({"k": k, "eps": eps, "chunk_size": chunk_size}, k=NEIGHBOURS, eps=_EPS, chunk_size=_CHUNK_SIZE)


def _log_squares(z: Tensor, neighbours: Tensor, columns: Sequence[int], eps: float) -> Tensor:
    """Log squared distances ``(N, K)`` to the chosen neighbours, exact and with gradient."""
    chosen = torch.stack([neighbours[:, column - 1] for column in columns], 1)
    others = z.index_select(0, chosen.flatten()).view(len(z), len(columns), z.shape[1])
    return (z[:, None] - others).square().sum(-1).add(eps).log()


def _constants(dim: int, columns: Sequence[int]) -> float:
    """What does not depend on the codes: minus the mean of psi(k), and the unit ball's log volume."""
    log_ball = dim / 2 * math.log(math.pi) - math.lgamma(dim / 2 + 1)
    return log_ball - sum(_digamma(column) for column in columns) / len(columns)


def _digamma(n: int) -> float:
    """Psi of an integer from 1 on: recurrence up to 10, then the asymptotic series, to 1e-10."""
    below = sum(1 / i for i in range(n, 10))
    n = max(n, 10)
    return math.log(n) - 1 / (2 * n) - 1 / (12 * n**2) + 1 / (120 * n**4) - 1 / (252 * n**6) - below
