"""The implicit gradient regularisation of SGD, and its coefficient at a learning rate."""

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Optimizer


def implicit_coefficient(optimizer: Optimizer, lr: float | None = None) -> float:
    r"""``phi(h)``: training with step ``h`` follows the flow of ``L + phi(h) |grad L|^2`` up to higher orders.

    .. math::
        \phi = \frac{h}{4}, \qquad
        \phi_\text{heavy ball} = \frac{h (1 + \beta)}{4 (1 - \beta)^2}, \qquad
        \phi_\text{Nesterov} = \frac{h (1 - \beta + 2 \beta^2)}{4 (1 - \beta)^2}

    Args:
        optimizer: ``torch.optim.SGD`` whose groups share rate, momentum, dampening and Nesterov; dampening ``d`` acts
            as the rate ``h (1 - d)``.
        lr: ``h``; the optimizer's present rate by default.

    Source:
        Barrett and Dherin 2021, eq. 4 (no momentum); Ghosh et al. 2023 (momentum: (1+b)/(1-b) times gradient descent at
        the same flow time); the Nesterov form is checked by simulation in the tests.

    Example:
        >>> import torch
        >>> weights = [torch.nn.Parameter(torch.ones(2))]
        >>> [round(implicit_coefficient(SGD(weights, lr=0.1, momentum=momentum)), 6) for momentum in (0.0, 0.9)]
        [0.025, 4.75]
    """
    group = optimizer.param_groups[0]
    beta = group["momentum"]
    h = float(group["lr"] if lr is None else lr)
    if not beta:
        return h / 4
    h *= 1 - group["dampening"]
    factor = 1 - beta + 2 * beta**2 if group["nesterov"] else 1 + beta
    return h * factor / (4 * (1 - beta) ** 2)


def require_sgd(optimizer: Optimizer) -> None:
    """Refuse optimizers without a known ``phi``."""
    if type(optimizer) is not SGD:
        raise MisconfigurationException(
            f"GradientPenalty(match_lr=...) needs torch.optim.SGD, got {type(optimizer).__name__}: the implicit term "
            "of adaptive optimizers is another one, not a multiple of |grad L|^2 (Cattaneo et al. 2024). Give "
            "coefficient instead."
        )
    names = ("lr", "momentum", "dampening", "nesterov", "maximize")
    settings = {tuple(group[name] for name in names) for group in optimizer.param_groups}
    if len(settings) > 1 or next(iter(settings))[-1] or next(iter(settings))[1] >= 1:
        raise MisconfigurationException(
            "GradientPenalty(match_lr=...) needs parameter groups that share lr and momentum, a momentum below 1 and "
            f"maximize=False; got (lr, momentum, dampening, nesterov, maximize) = {sorted(settings)}. "
            "Give coefficient instead."
        )
