"""Classifier-free guidance on denoisers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must
from lightning_plugins.sid.denoiser import Denoiser

_CONDITIONING = must.Rule(
    lambda value: isinstance(value, Mapping) and not {"x", "sigma"} & value.keys(),
    "a dict of the network's keyword arguments",
)


def guided(
    denoiser: Denoiser,
    x: Tensor,
    sigma: Tensor,
    conditioning: Mapping[str, Any],
    null_conditioning: Mapping[str, Any] | None,
    scale: float,
) -> Tensor:
    r"""The guided mean image, in one call of the network with twice the batch.

    .. math:: D_\kappa(x, \sigma) = D_\emptyset + \kappa \, (D_c - D_\emptyset)

    As D is affine in a network's epsilon, v or flow with the same coefficients for both halves, this is the guidance
    that pipelines apply to those.

    Args:
        denoiser: the network in EDM's scaling.
        x: ``(B, C, H, W)`` noisy images in EDM scaling.
        sigma: ``(B,)`` noise levels of the images.
        conditioning: the network's keyword arguments: tensors ``(B, ...)``, or dicts of such.
        null_conditioning: the network's keyword arguments for no condition, with equal keys: tensors ``(B, ...)`` or
            ``(1, ...)``. Unused at scale 1.
        scale: kappa; 1 is the plain conditional denoiser, in one call with the batch as it is. 1.5 to 4.5 in SiD-LSG.

    Returns:
        ``(B, C, H, W)``, float32.

    Raises:
        ValueError: a scale that is no number, or other than 1 without null_conditioning, or with other keys.

    Source: Ho & Salimans 2022 (arXiv 2207.12598); Zhou et al. 2024 (SiD-LSG, arXiv 2406.01561).
    """
    must.check(
        {"denoiser": denoiser, "x": x, "sigma": sigma, "conditioning": conditioning, "scale": scale},
        denoiser=must.module,
        x=must.tensor("(B, ...)"),
        sigma=must.tensor("(B,)"),
        conditioning=_CONDITIONING,
        scale=must.finite,
    )
    must.optional(_CONDITIONING)("null_conditioning", null_conditioning)
    if scale == 1:
        return denoiser(x, sigma, **conditioning)
    if null_conditioning is None:
        raise ValueError(
            f"guidance={scale} needs a condition that stands for none, and this teacher has none (null_conditioning, "
            "such as a class beyond its own, or the empty prompt): set guidance to 1."
        )
    both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), **_stack(conditioning, null_conditioning))
    conditional, unconditional = both.chunk(2)
    return unconditional + scale * (conditional - unconditional)


def _stack(conditioning: Mapping[str, Any], null: Mapping[str, Any]) -> dict[str, Any]:
    if conditioning.keys() != null.keys():
        raise ValueError(
            f"null_conditioning has {sorted(null)}, but conditioning has {sorted(conditioning)}: guidance needs the "
            "same of both."
        )
    return {key: _join(value, null[key]) for key, value in conditioning.items()}


def _join(value: Any, null: Any) -> Any:
    if isinstance(value, Mapping):
        return _stack(value, null)
    return torch.cat([value, null.to(value).expand_as(value)])
