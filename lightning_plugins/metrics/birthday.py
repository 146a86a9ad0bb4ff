"""The birthday problem put to work: how many different images a generator has, read from its near-duplicates.

Shapes: B samples of an update, F features of one, N samples in all, K closest pairs, R runs without a near-duplicate.
"""

import math

import torch
from torch import Tensor, nn
from torchmetrics.utilities import rank_zero_warn

from lightning_plugins.core import arguments as must
from lightning_plugins.metrics.features import FeatureMetric, FeatureRows
from lightning_plugins.metrics.near_duplicates import closest_pairs, near_duplicates

_FEW_PAIRS = 10  # real pairs below which the threshold says little


class BirthdayParadox(FeatureMetric, FeatureRows):
    r"""Number of different images that a generator seems to draw from, by how often two samples nearly coincide.

    The threshold :math:`\tau` is the distance within which a pair of *real* images lies with probability
    ``collision_probability``. Of s samples, c pairs are that close, and

    .. math:: N_\mathrm{eff} = \binom s2 / c,

    1e4 for real images by construction, the number of images for a generator that has collapsed to some, and
    :math:`1 / \sum p^2` if they differ in probability p. Diverse garbage scores high and blur scores low, so read it
    beside precision or the Fréchet distance.

    The interval is Poisson's (:func:`poisson_interval`) for an effective number of pairs m: the relative variances of
    the two counts add up, with the dispersion :math:`\phi` of :func:`near_duplicates`,
    :math:`1/m = \phi / c + \phi_\mathrm{real} / c_\mathrm{real}`. This takes generated pairs to become more frequent
    with the threshold as real ones do, which is cautious for a collapsed generator.

    Arora and Zhang's own form stands beside it: the batch size s at which a batch holds a near-duplicate half of the
    time (:func:`half_batch_size`), hence :math:`n = s^2 / (2 \ln 2)`. It needs many times s samples, and changes with
    their order, as batches are of samples in a row: over several processes it is that of the samples process after
    process, and ``merge_state`` puts the other metric's after the own. All else is the same in any order, but for the
    choice among more than ``max_real`` real images.

    Args:
        feature: what images are compared by: digits (a small classifier in the package), inception (which needs
            torch-fidelity), or a module with the attribute num_features. None takes features (B, F) in place of images,
            such as images.flatten(1) to compare pixels.
        threshold: largest distance of two images that count as one; real images are then not needed. Default: from the
            real images, by collision_probability.
        collision_probability: share of the pairs of real images that the threshold lets in, between 0 and 1; with 1e-4,
            5,000 samples as diverse as real ones give 1,250 pairs.
        level: chance that an interval holds the true value, between 0 and 1.
        max_real: most real images that are compared, 2 or more, taken evenly from all that came.
        chunk_size: rows compared at a time; memory is so many times N numbers of float64.
        reset_real_features: whether a reset forgets the real images, too.

    Raises:
        ValueError: a number outside its range; too few real images for one pair at ``collision_probability``.

    Source: Arora and Zhang 2017, arXiv 1706.08224; the automatic threshold and the intervals are ours.

    Example:
        >>> birthday = BirthdayParadox(feature=None, threshold=0.5)
        >>> birthday.update(torch.arange(200.0).repeat(5)[:, None], real=False)  # each of 200 items five times
        >>> values = birthday.compute()
        >>> int(values["pairs"]), round(values["support_size"].item())
        (2000, 250)
    """

    def __init__(
        self,
        feature: str | nn.Module | None = "digits",
        threshold: float | None = None,
        collision_probability: float = 1e-4,
        level: float = 0.95,
        max_real: int = 10_000,
        chunk_size: int = 512,
        reset_real_features: bool = False,
    ) -> None:
        must.check(
            locals(),
            threshold=must.optional(must.number(0, why="it is a distance")),
            collision_probability=must.proportion,
            level=must.proportion,
            max_real=must.whole(2),
            chunk_size=must.count,
        )
        super().__init__(feature, reset_real_features=reset_real_features)
        self.threshold, self.collision_probability, self.level = threshold, collision_probability, level
        self.max_real, self.chunk_size = max_real, chunk_size
        self._of_real: tuple[int, float, float] | None = None  # so that an unchanged reference is searched once

    def compute(self) -> dict[str, Tensor]:
        """What the samples of all processes say.

        Returns:
            ``support_size`` with ``support_size_lower`` and ``support_size_upper``; ``pairs`` near each other, and the
            ``threshold``; ``batch_size``, ``batch_size_lower``, ``batch_size_upper`` and ``batch_support_size``. If no
            pair is near, sizes are bounds from below, upper ends are infinite, and a warning says so.

        Raises:
            ValueError: fewer than two samples, or too few real ones.
        """
        real, fake = self._samples()
        threshold, real_variance = self._threshold(real)
        found = near_duplicates(fake, threshold, self.chunk_size)
        pairs = math.comb(len(fake), 2)
        effective = 1 / (found.dispersion / found.count + real_variance) if found.count else 0.0
        fewest, most = poisson_interval(effective, self.level)
        if found.count:
            size = pairs / found.count
            lower, upper = size * effective / most, size * effective / fewest
        else:
            size = lower = pairs / most
            upper = math.inf
            rank_zero_warn(
                f"BirthdayParadox: no two of {len(fake)} samples are near each other, so that support_size={size:.3g} "
                "is only its lower bound. Draw more samples for an estimate."
            )
        batch, batch_lower, batch_upper = half_batch_size(*run_lengths(found.previous), self.level)
        values = {
            "support_size": size,
            "support_size_lower": lower,
            "support_size_upper": upper,
            "pairs": found.count,
            "threshold": threshold,
            "batch_size": batch,
            "batch_size_lower": batch_lower,
            "batch_size_upper": batch_upper,
            "batch_support_size": support_size(batch),
        }
        return {name: torch.tensor(float(value), device=self.device) for name, value in values.items()}

    def closest_pairs(self, num: int = 10) -> tuple[Tensor, Tensor]:
        """The closest pairs of generated samples of all processes, each sample in one pair at most; all must call it.

        Args:
            num: number of pairs wanted.

        Returns:
            Distances ``(K,)`` and ``(K, 2)`` int64: samples counted in their order, process after process.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            distances, pairs = closest_pairs(self._samples()[1], 20 * num, self.chunk_size)
        taken: set[int] = set()
        chosen = []
        for index, pair in enumerate(pairs.tolist()):
            if taken.isdisjoint(pair) and len(chosen) < num:
                taken.update(pair)
                chosen.append(index)
        return distances[chosen].float(), pairs[chosen]

    def _samples(self) -> tuple[Tensor, Tensor]:
        real, fake = self.rows()
        if len(fake) < 2:
            raise ValueError(f"BirthdayParadox compares pairs of samples, got {len(fake)}: update it with real=False.")
        return real, fake

    def _threshold(self, real: Tensor) -> tuple[float, float]:
        """The threshold, and the relative variance that the finite number of real images gives it."""
        if self.threshold is not None:
            return self.threshold, 0.0
        if self._of_real is None or self._of_real[0] != len(real):
            chosen = real
            if len(real) > self.max_real:
                chosen = real[torch.linspace(0, len(real) - 1, self.max_real, dtype=torch.float64).long()]
            num = self._real_pairs(len(chosen))
            threshold = float(closest_pairs(chosen, num, self.chunk_size)[0][-1])
            found = near_duplicates(chosen, threshold, self.chunk_size)
            self._of_real = len(real), threshold, found.dispersion / found.count
        return self._of_real[1:]

    def _real_pairs(self, num_real: int) -> int:
        """How many real pairs the threshold lets in."""
        num = round(self.collision_probability * math.comb(num_real, 2))
        if not num:
            needed = math.ceil(math.sqrt(1 / self.collision_probability) + 0.5)
            raise ValueError(
                f"collision_probability={self.collision_probability} of all pairs rounds to no pair of {num_real} real "
                f"images (max_real={self.max_real}): give at least {needed}, or a larger probability, or a fixed "
                "threshold."
            )
        if num < _FEW_PAIRS:
            rank_zero_warn(
                f"BirthdayParadox: its threshold rests on {num} pair(s) of {num_real} real images, so that "
                "support_size is uncertain: give more real images, or a larger collision_probability."
            )
        return num

    def reset(self) -> None:
        """Forget the generated samples, and the real ones if wanted."""
        super().reset()
        if self.reset_real_features:
            self._of_real = None


def poisson_interval(count: float, level: float = 0.95) -> tuple[float, float]:
    r"""Exact (Garwood) interval of a Poisson mean after ``count`` events.

    .. math:: P(X \ge c \mid \lambda_-) = P(X \le c \mid \lambda_+) = \frac{1 - \text{level}}{2}

    Args:
        count: c >= 0; the gamma function takes fractions too.
        level: chance that the interval holds the mean, at least.

    Returns:
        The two ends; 0 is the lower one of no event.

    Source: Garwood 1936, Biometrika 28.

    Example:
        >>> [round(end, 2) for end in poisson_interval(0)], [round(end, 2) for end in poisson_interval(10)]
        ([0.0, 3.69], [4.8, 18.39])
    """
    tail = (1 - level) / 2
    lower = _gamma_quantile(count, tail) if count > 0 else 0.0
    return lower, _gamma_quantile(count + 1, 1 - tail)


def _gamma_quantile(shape: float, probability: float) -> float:
    a = torch.tensor(shape, dtype=torch.float64)
    low, high = 0.0, shape + 20 * math.sqrt(shape) + 50
    for _ in range(100):  # bisection, to the last bit
        middle = (low + high) / 2
        below = torch.special.gammainc(a, torch.tensor(middle, dtype=torch.float64)) < probability
        low, high = (middle, high) if below else (low, middle)
    return high


def run_lengths(previous: Tensor) -> tuple[Tensor, int]:
    """How many samples are drawn until two are near-duplicates, again and again from the sample after.

    Args:
        previous: ``(N,)`` int64, the latest earlier near-duplicate of each sample, as :func:`near_duplicates` finds it.

    Returns:
        ``(R,)`` int64 lengths of finished runs, and that of the last, unfinished one.
    """
    lengths, start = [], 0
    for index, earlier in enumerate(previous.tolist()):
        if earlier >= start:
            lengths.append(index + 1 - start)
            start = index + 1
    return torch.tensor(lengths, dtype=torch.int64), len(previous) - start


def half_batch_size(lengths: Tensor, unfinished: int, level: float = 0.95) -> tuple[float, float, float]:
    r"""The batch size at which near-duplicates appear half of the time: the median run, with an exact interval.

    Whatever the distribution, the median lies between the r-th shortest and the r-th longest of R runs with a chance
    of :math:`1 - 2 P(\mathrm{Bin}(R, \tfrac12) < r)`.

    Args:
        lengths: ``(R,)`` int64 lengths of finished runs.
        unfinished: length of the last run; it counts as a long one if it is longer than the median of the others.
        level: chance that the interval holds the median, at least.

    Returns:
        s and its ends. Where the samples end too early the estimate is a bound from below, and the upper end infinite.
    """
    runs = lengths.double().sort().values
    if not len(runs) or unfinished > runs.median():
        runs = torch.cat([runs, torch.tensor([math.inf], dtype=torch.float64)])
    R, r = len(runs), torch.arange(len(runs), dtype=torch.float64)
    log_odds = math.lgamma(R + 1) - (r + 1).lgamma() - (R - r + 1).lgamma() - R * math.log(2)
    rank = int((log_odds.exp().cumsum(0) <= (1 - level) / 2).sum())
    lower, upper = (float(runs[rank - 1]), float(runs[R - rank])) if rank else (2.0, math.inf)
    middle = float(runs[(R - 1) // 2])
    return (middle, lower, upper) if middle < math.inf else (float(unfinished), lower, upper)


def support_size(batch_size: float | Tensor) -> float | Tensor:
    r"""Number of equally likely items of which a batch of s holds two equal ones half of the time.

    .. math:: 1 - e^{-s^2 / 2n} = \tfrac12 \quad\Longrightarrow\quad n = \frac{s^2}{2 \ln 2}

    Where items differ in probability p it stays below their number, near :math:`1 / \sum p^2`: a heavy head decides.

    Args:
        batch_size: s, samples in a batch.

    Returns:
        n. Exact to a few per cent from s = 30.

    Source: Arora and Zhang 2017, arXiv 1706.08224, section 3.

    Example:
        >>> round(support_size(472)), round(support_size(119))
        (160705, 10215)
    """
    return batch_size**2 / (2 * math.log(2))
