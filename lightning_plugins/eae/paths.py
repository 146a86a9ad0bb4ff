"""Paths between codes."""

import math
from typing import Literal

import torch
from torch import Tensor

PathMode = Literal["linear", "slerp"]
_PARALLEL = 1e-3  # radians below which a great circle is a straight line, and a float32 cosine 1, to rounding


def interpolate_codes(a: Tensor, b: Tensor, num_steps: int, mode: PathMode = "linear") -> Tensor:
    r"""Codes on the way from ``a`` to ``b``, both ends included.

    .. math:: \text{linear: } (1 - t) a + t b, \qquad
              \text{slerp: } \frac{\sin((1 - t) \omega) a + \sin(t \omega) b}{\sin \omega},
              \quad \omega = \angle(a, b)

    The straight line passes nearer to the origin than codes of many dimensions lie; the great circle keeps their
    radius. Opposite codes have no shortest great circle: the line is taken.

    Args:
        a: ``(B, d)``.
        b: ``(B, d)``.
        num_steps: S, 2 or more.
        mode: ``linear`` or ``slerp`` (Shoemake 1985).

    Returns:
        ``(B, S, d)``.

    Raises:
        ValueError: ``num_steps`` below 2, or another mode.

    Example:
        >>> interpolate_codes(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 3, "slerp")[0, 1]
        tensor([0.7071, 0.7071])
    """
    if num_steps < 2:
        raise ValueError(f"num_steps={num_steps} must be 2 or more: both ends are included.")
    if mode not in ("linear", "slerp"):
        raise ValueError(f"mode={mode!r} must be 'linear' or 'slerp'.")
    t = torch.linspace(0, 1, num_steps, dtype=a.dtype, device=a.device)[None, :, None]
    a, b = a[:, None], b[:, None]
    line = (1 - t) * a + t * b
    if mode == "linear":
        return line
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)[..., None]
    straight = cosine.abs() >= math.cos(_PARALLEL)
    angle = cosine.masked_fill(straight, 0).acos()  # masked here: behind it, gradients would be NaN
    arc = ((1 - t) * angle).sin() / angle.sin() * a + (t * angle).sin() / angle.sin() * b
    return torch.where(straight, line, arc)
