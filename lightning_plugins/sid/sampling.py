"""Images of a denoiser in many steps, as a teacher makes them."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.guidance import guided


def step_levels(denoiser: Denoiser, num_steps: int) -> Tensor:
    """Noise levels ``(num_steps + 1,)`` from the largest to 0, float32 on the CPU.

    For VP teachers those of diffusers' ``timestep_spacing="trailing"``, which begins at the last timestep whatever
    their scheduler's own spacing; else the scheduler's, without flow matching's shift by an image's size.

    Args:
        denoiser: the model whose levels they are.
        num_steps: number of steps, 1 or more; for VP teachers at most the levels there are.

    Raises:
        ValueError: more steps than levels, or none.
    """
    most = len(denoiser.sigmas) if denoiser.kind == "vp" else None
    must.count("num_steps", num_steps)
    if most is not None and num_steps > most:
        raise ValueError(f"num_steps={num_steps} must be 1 to {most}, the teacher's noise levels.")
    if most is not None:
        index = most - most / num_steps * torch.arange(num_steps, dtype=torch.float64)
        levels = denoiser.sigmas.cpu()[index.round().long() - 1]
    else:
        levels = _scheduler_levels(denoiser, num_steps)
    return torch.cat([levels, levels.new_zeros(1)])


def _scheduler_levels(denoiser: Denoiser, num_steps: int) -> Tensor:
    import diffusers

    config = denoiser.scheduler_config
    fixed = {"use_dynamic_shifting": False} if config.get("use_dynamic_shifting") else {}
    scheduler = getattr(diffusers, config["_class_name"]).from_config({**config, **fixed})
    scheduler.set_timesteps(num_steps)
    levels = scheduler.sigmas.double().unique().flip(0)  # solvers of second order have each twice
    levels = levels[levels > 0]
    levels = levels / (1 - levels) if denoiser.kind == "flow" else levels
    levels[0] = denoiser.sigma_max  # an exponential schedule of one step has the lowest alone
    return levels.clamp(denoiser.sigma_min, denoiser.sigma_max).float()


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

    Where the teacher's scheduler clips its denoised images (``clip_sample``), so does this: the first D, as diffusers'
    DDIM does, and not the one in the direction.

    Args:
        denoiser: the teacher's network in EDM's scaling.
        noise: ``(B, C, H, W)`` of unit variance.
        num_steps: number of steps, each a call of the network.
        conditioning: the network's keyword arguments.
        null_conditioning: the network's keyword arguments for no condition; needed for guidance other than 1.
        guidance: scale of classifier-free guidance; 1 is none.

    Returns:
        ``(B, C, H, W)`` clean samples, not clamped further.

    Raises:
        ValueError: an argument is out of range, or guidance is asked of a teacher without a null condition.
    """
    must.check(
        locals(),
        denoiser=must.module,
        noise=must.tensor("(B, C, H, W)"),
        conditioning=must.optional(must.mapping),
        null_conditioning=must.optional(must.mapping),
        guidance=must.finite,
    )
    levels = step_levels(denoiser, num_steps).to(noise.device)
    x = noise * denoiser.input_scale(float(levels[0]))
    for sigma, following in itertools.pairwise(levels):
        mean = guided(denoiser, x, sigma.expand(len(x)), conditioning or {}, null_conditioning, guidance)
        x = (clip(denoiser, mean) if clips(denoiser) else mean) + (following / sigma) * (x - mean)
    return x


def clips(denoiser: Denoiser) -> bool:
    """Whether the teacher's scheduler clamps denoised images."""
    return bool(denoiser.scheduler_config.get("clip_sample", False))


def clip(denoiser: Denoiser, mean: Tensor) -> Tensor:
    """Denoised images, clamped to the scheduler's ``clip_sample_range``, [-1, 1] in most."""
    reach = denoiser.scheduler_config.get("clip_sample_range", 1.0)
    return mean.clamp(-reach, reach)
