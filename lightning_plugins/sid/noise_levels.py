"""Noise levels sigma at which the networks are asked: along EDM's schedule, log-normal, or on a teacher's own grid."""

from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.core.random_numbers import rand, randn
from lightning_plugins.sid.denoiser import Denoiser

Levels = Literal["edm", "grid"]


def draw_levels(
    denoiser: Denoiser, n: int, kind: Levels, generator: torch.Generator, *, fake: bool, t_min: float, t_max: float
) -> Tensor:
    """Noise levels ``(n,)`` of an update, each one of the teacher's.

    Args:
        denoiser: the teacher's, or another over its grid.
        n: number of samples.
        kind: ``edm``: the paper's distributions, moved to the teacher's nearest levels; ``grid``: its own timesteps,
            each as likely.
        generator: where the random numbers come from; they are drawn on its device.
        fake: draw for the fake score, whose levels are log-normal, or all of the grid's.
        t_min: lowest level of the generator's, in thousandths of the schedule.
        t_max: highest level of the generator's, in thousandths of the schedule.

    Raises:
        ValueError: ``grid`` for a teacher of continuous levels.
    """
    if kind == "grid":
        if denoiser.sigmas is None:
            raise ValueError("noise_levels='grid' needs timesteps, and this teacher's levels have none: use 'edm'.")
        first, last = (0.0, 1000.0) if fake else (t_min, t_max)
        return grid_sigmas(n, denoiser.sigmas, generator=generator, t_min=first, t_max=last)
    device = generator.device
    if fake:
        return denoiser.nearest(fake_score_sigmas(n, generator=generator, device=device))
    return denoiser.nearest(generator_sigmas(n, generator=generator, t_min=t_min, t_max=t_max, device=device))


def karras_sigmas(r: Tensor, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    r"""Noise levels along EDM's schedule, from 0 for the least noise to 1 for the most.

    .. math:: \sigma(r) = \left(\sigma_{\min}^{1/\rho} + r (\sigma_{\max}^{1/\rho} - \sigma_{\min}^{1/\rho})\right)^\rho

    Args:
        r: places along the schedule, in [0, 1] and of any shape.
        sigma_min: level at r = 0, above 0; 0.002 in EDM.
        sigma_max: level at r = 1; 80 in EDM.
        rho: larger values put more levels near ``sigma_min``; 7 in EDM.

    Returns:
        The shape of r, in [sigma_min, sigma_max].

    Raises:
        ValueError: levels that are not positive and increasing, or another argument out of range.

    Source: Karras et al. 2022 (arXiv 2206.00364) eq. 5, counted from the other end.

    Example:
        >>> [round(sigma, 3) for sigma in karras_sigmas(torch.tensor([0.0, 0.4, 0.8, 1.0])).tolist()]
        [0.002, 0.965, 24.408, 80.0]
    """
    must.check(
        {"r": r, "sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho},
        r=must.tensor(),
        sigma_min=must.positive,
        sigma_max=must.positive,
        rho=must.number(0.05, why="the levels overflow below"),
    )
    if not sigma_min < sigma_max:
        raise ValueError(f"sigma_min={sigma_min} must be positive and below sigma_max={sigma_max}.")
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + r * (high - low)) ** rho


def generator_sigmas(
    n: int,
    *,
    generator: torch.Generator | None = None,
    t_min: float = 0.0,
    t_max: float = 800.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw noise levels for the generator's loss: :func:`karras_sigmas` of r ~ U[t_min / 1000, t_max / 1000].

    Args:
        n: number of levels.
        generator: where the random numbers come from; they are drawn on its device.
        t_min: least noise, in thousandths of the schedule; 0 in the paper.
        t_max: most noise, in thousandths of the schedule; 800 in the paper: levels up to 24.4, with median 0.97.
        sigma_min: lowest level of the schedule; 0.002 in EDM. A teacher with a discrete grid needs its nearest levels:
            ``Denoiser.nearest``.
        sigma_max: highest level of the schedule; 80 in EDM.
        device: where the levels are wanted; by default where the generator is.

    Returns:
        ``(n,)`` float32.

    Raises:
        ValueError: not 0 <= t_min < t_max <= 1000.

    Source: Zhou et al. 2024 (arXiv 2404.04057), algorithm 1 and the authors' code.
    """
    check_times(t_min, t_max)
    r = (t_min + (t_max - t_min) * rand((n,), generator, device)) / 1000
    return karras_sigmas(r, sigma_min, sigma_max)


def grid_sigmas(
    n: int,
    sigmas: Tensor,
    *,
    generator: torch.Generator | None = None,
    t_min: float = 0.0,
    t_max: float = 1000.0,
) -> Tensor:
    """Draw noise levels from a teacher's own grid, each as likely: its integer t, exact without interpolation.

    Args:
        n: number of levels.
        sigmas: ``(T,)`` increasing levels, as ``Denoiser.sigmas``.
        generator: where the random numbers come from; they are drawn on its device.
        t_min: first level, in thousandths of the grid; 20 in SiD-LSG.
        t_max: end of the levels, in thousandths of the grid; 980 in SiD-LSG, which draws t from 20 to 979 of 1000.

    Returns:
        ``(n,)`` with type and device of ``sigmas``.

    Raises:
        ValueError: not 0 <= t_min < t_max <= 1000, or no level between them.

    Example:
        >>> grid_sigmas(3, torch.linspace(0.1, 1.0, 10), t_min=900)
        tensor([1., 1., 1.])
    """
    check_times(t_min, t_max)
    low, high = round(t_min / 1000 * len(sigmas)), round(t_max / 1000 * len(sigmas))
    if low == high:
        raise ValueError(f"t_min={t_min} and t_max={t_max} leave none of {len(sigmas)} noise levels: widen them.")
    drawn = low + ((high - low) * rand((n,), generator, sigmas.device)).long()
    return sigmas[drawn.clamp(max=high - 1)]  # a product may round up to high


def fake_score_sigmas(
    n: int,
    *,
    mean: float = -1.2,
    std: float = 1.2,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw noise levels for training the fake score, as EDM trains: :math:`\ln \sigma \sim N(mean, std^2)`.

    Args:
        n: number of levels.
        mean: mean of the logarithm; -1.2 in EDM.
        std: standard deviation of the logarithm; 1.2 in EDM.
        generator: where the random numbers come from; they are drawn on its device.
        device: where the levels are wanted; by default where the generator is.

    Returns:
        ``(n,)`` float32.

    Source: Karras et al. 2022 (arXiv 2206.00364) table 1; the same in SiD.
    """
    return (mean + std * randn((n,), generator, device)).exp()


def check_times(t_min: float, t_max: float) -> None:
    """Refuse what is no interval of thousandths.

    Args:
        t_min: its beginning.
        t_max: its end.

    Raises:
        ValueError: not 0 <= t_min < t_max <= 1000.
    """
    must.check({"t_min": t_min, "t_max": t_max}, t_min=must.finite, t_max=must.finite)
    if not 0 <= t_min < t_max <= 1000:
        raise ValueError(
            f"t_min={t_min} and t_max={t_max} must satisfy 0 <= t_min < t_max <= 1000 (thousandths of the schedule)."
        )
