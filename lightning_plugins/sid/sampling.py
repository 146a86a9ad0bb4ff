"""Images of a denoiser in many steps, as a teacher makes them."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.guidance import guided


def step_levels(denoiser: Denoiser, num_steps: int) -> Tensor:
    """Noise levels ``(num_steps + 1,)`` from the largest to 0: equal steps of the teacher's time, or EDM's for EDM.

    Args:
        denoiser: whose grid the levels are of.
        num_steps: 1 or more; at most the levels there are.

    Raises:
        ValueError: more steps than levels, or none.
    """
    most = len(denoiser.sigmas) if denoiser.sigmas is not None else None
    if num_steps < 1 or (most is not None and num_steps > most):
        raise ValueError(f"num_steps={num_steps} must lie in 1..{most or 'any'}: the teacher has {most} noise levels.")
    if denoiser.sigmas is None:
        low, high = denoiser.sigma_min ** (1 / 7), denoiser.sigma_max ** (1 / 7)
        levels = torch.linspace(high, low, num_steps) ** 7
    else:
        index = torch.linspace(len(denoiser.sigmas) - 1, 0, num_steps + 1, device=denoiser.sigmas.device)[:-1]
        levels = denoiser.sigmas[index.round().long()]
    return torch.cat([levels, levels.new_zeros(1)])


@torch.no_grad()
def many_steps(
    denoiser: Denoiser,
    noise: Tensor,
    num_steps: int,
    conditioning: Mapping[str, Any] | None = None,
    null_conditioning: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
) -> Tensor:
    r"""Follow the probability-flow ODE from noise to an image by Euler's method, which for VP teachers is DDIM.

    .. math:: x_{i+1} = D(x_i, \sigma_i) + \sigma_{i+1} \frac{x_i - D(x_i, \sigma_i)}{\sigma_i}

    Where the teacher's scheduler clips its denoised images (``clip_sample``), so does this.

    Args:
        denoiser: the teacher's.
        noise: ``(B, C, H, W)`` of unit variance.
        num_steps: calls of the network.
        conditioning: the network's keyword arguments.
        null_conditioning: the same for no condition, for guidance other than 1.
        guidance: classifier-free guidance's scale.

    Returns:
        ``(B, C, H, W)`` clean samples, not clamped further.
    """
    levels = step_levels(denoiser, num_steps).to(noise.device)
    x = noise * denoiser.input_scale(denoiser.sigma_max) if denoiser.kind != "edm" else noise * levels[0]
    for sigma, following in itertools.pairwise(levels):
        mean = guided(denoiser, x, sigma.expand(len(x)), conditioning or {}, null_conditioning, guidance)
        mean = clip(denoiser, mean)
        x = mean + (following / sigma) * (x - mean)
    return x


def clip(denoiser: Denoiser, mean: Tensor) -> Tensor:
    """Cut denoised images as the teacher's scheduler does; as they are where it does not."""
    config = denoiser.scheduler_config
    if not config.get("clip_sample", False):
        return mean
    reach = config.get("clip_sample_range", 1.0)
    return mean.clamp(-reach, reach)
