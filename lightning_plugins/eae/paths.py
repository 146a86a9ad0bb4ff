"""Paths between codes."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must

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
        a: ``(B, d)`` codes where the ways begin.
        b: ``(B, d)`` codes where they end.
        num_steps: codes S on each way, 2 or more.
        mode: ``linear`` or ``slerp`` (Shoemake 1985).

    Returns:
        ``(B, S, d)``.

    Raises:
        ValueError: ``num_steps`` below 2, another mode, or codes of different shapes.

    Example:
        >>> interpolate_codes(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 3, "slerp")[0, 1]
        tensor([0.7071, 0.7071])
    """
    must.check(
        locals(),
        a=must.tensor("(B, d)"),
        b=must.tensor("(B, d)"),
        num_steps=must.whole(2, why="both ends are included"),
        mode=must.one_of(PathMode),
    )
    if a.shape != b.shape:
        raise ValueError(f"b={must.told(b)} must have the shape of a, {tuple(a.shape)}: as many codes, of one length.")
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
