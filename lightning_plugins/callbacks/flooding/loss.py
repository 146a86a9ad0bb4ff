"""Flooding as a loss function: for training steps of one's own, and for the forms that need every sample's loss."""

import math
from typing import Literal

import torch
from torch import Tensor

from lightning_plugins.core import arguments as must

FloodKind = Literal["batch", "sample", "soft"]


def flood(losses: Tensor, level: float, kind: FloodKind = "batch") -> Tensor:
    r"""Keep losses around a level b: descend on what lies above it, ascend on what lies below.

    .. math::
        \text{batch:}\quad |\bar\ell - b| + b, \qquad
        \text{sample:}\quad \frac{1}{n} \sum_i |\ell_i - b| + b, \qquad
        \text{soft:}\quad b + \frac{1}{n} \sum_i \rho(\ell_i - b),

    with the mean :math:`\bar\ell` of the losses and :math:`\rho(x) = \sqrt{x^2 + 1} - 1`, whose derivative
    :math:`x / \sqrt{x^2 + 1}` weights a sample by its signed distance from the level. At the level itself the gradient
    of the first two is that of descent. The batch is what the function is given: one micro-batch of one rank; the
    callback :class:`Flooding` looks at the whole effective batch.

    Args:
        losses: one loss for each sample (``reduction="none"``), of any shape; ``"batch"`` also takes their mean, a
            0-dim tensor. Leave out positions that do not count, such as padding. Half precision is widened.
        level: the level ``b``, in units of the loss; ``-inf`` gives the plain mean.
        kind: ``"batch"`` is Ishida et al.'s Flooding, ``"sample"`` iFlood, ``"soft"`` SoftAD.

    Returns:
        0-dim tensor, at least fp32.

    Raises:
        ValueError: an argument out of range, or a mean where single losses are needed.

    Source:
        Ishida et al., Do We Need Zero Training Loss After Achieving Zero Training Error?, ICML 2020 (``batch``); Xie
        et al., iFlood, ICLR 2022 (``sample``); Holland and Nakatani, Soft ascent-descent as a stable and flexible
        alternative to flooding, NeurIPS 2024, arXiv 2310.10006, section 3 (``soft``), in the form of its authors'
        published code (``Loss_SoftAD`` and ``rho_torch`` in github.com/feedbackward), with their ``theta = b`` and
        ``sigma = eta = 1``.

    Example:
        >>> losses = torch.tensor([0.25, 1.0])
        >>> [round(flood(losses, 0.5, kind).item(), 4) for kind in ("batch", "sample", "soft")]
        [0.625, 0.875, 0.5744]
    """
    check_level("level", level)
    must.one_of(FloodKind)("kind", kind)
    must.tensor(dtype="any")("losses", losses)
    if kind != "batch" and losses.ndim == 0:
        raise ValueError(
            f"kind={kind!r} needs a loss for each sample, got a single number: compute the loss with reduction='none'."
        )
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    if level == -math.inf:
        return losses.mean()
    if kind == "batch":
        return _reflect(losses.mean(), level)
    if kind == "sample":
        return _reflect(losses, level).mean()
    return level + (torch.sqrt((losses - level) ** 2 + 1) - 1).mean()


def _reflect(losses: Tensor, level: float) -> Tensor:
    """``|l - b| + b``, exactly ``l`` above the level."""
    return torch.where(losses < level, 2 * level - losses, losses)


def check_level(name: str, level: float) -> None:
    """Raise unless ``level`` is a number or ``-inf``.

    Raises:
        ValueError: naming the argument and its value.
    """
    if not (isinstance(level, float) and level == -math.inf):
        must.number(why="it is in units of the loss, -inf is for none")(name, level)
