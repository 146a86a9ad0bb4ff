r"""What a ``torch.optim.Optimizer`` is, read as a solver of a flow: rate, preconditioner, stability limit, flow time.

Notation: ``h`` learning rate, ``b`` momentum, ``d`` dampening, ``w`` weight decay, ``P`` the optimizer's diagonal
preconditioner (one for SGD, ``sqrt(v) + eps`` for RMSprop, ``sqrt(v_hat) + eps`` for Adam). Without momentum a step is
Euler's for :math:`\dot\theta = -P^{-1} \nabla L`. On a quadratic with the Hessian ``H`` it is stable while
``h * lambda`` stays below a limit, ``lambda`` the largest eigenvalue of :math:`P^{-1/2} H P^{-1/2}`:

==================================  ==========================  ====================
optimizer                           limit on ``h * lambda``     flow time of a step
==================================  ==========================  ====================
SGD                                 2                           h
SGD, momentum b, dampening d        2 (1+b) / (1-d)             h (1-d) / (1-b)
SGD, Nesterov                       2 (1+b) / (1+2b)            h / (1-b)
RMSprop, NormRMSprop                2                           h
both with momentum                  2 (1+b)                     h / (1-b)
Adam                                2 (1+b) / (1-b)             h
AdamW (decoupled decay)             (1+b) (2-hw) / (1-b)        h
==================================  ==========================  ====================

- Coupled (L2) weight decay is part of the objective: ``H + w`` stands for ``H``.
- For RMSprop and Adam the limit holds for a frozen ``v``. A live ``v`` grows with the gradients and corrects itself, so
  that a ratio above one is an edge, not a divergence.
- A momentum buffer that starts at zero is not yet full: the n-th step of a constant gradient is as long as
  ``h (1-b^n) / (1-b)``, one power more for Nesterov, and that is its flow time. Adam corrects this itself.
- Parameter groups may differ in rate and weight decay. ``h`` is the largest rate, and a group with the rate ``h_i``
  counts as preconditioned by ``h / h_i`` besides ``P``: what is said of ``h * lambda`` holds exactly. Of different
  decoupled decays the largest ``h * w`` counts.

Sources: Polyak 1964 (momentum); Cohen et al. 2021, https://arxiv.org/abs/2103.00065, appendix B (SGD family); Cohen et
al. 2022, https://arxiv.org/abs/2207.14484, eq. 4 (Adam). The rest follows alike: the root of the characteristic
polynomial that passes through -1.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_plugins.callbacks.implicit_regularization import implicit_coefficient
from lightning_plugins.core.optimizers import parameters_of

# Where the known steps are made, by module and class; of two with the same step the later one names it.
_FAMILIES = {
    "torch.optim.sgd": "SGD",
    "torch.optim.rmsprop": "RMSprop",
    "torch.optim.adamw": "AdamW",
    "torch.optim.adam": "Adam",
    "lightning_plugins.optim.norm_rmsprop": "NormRMSprop",
}
_HOOKED = Optimizer.profile_hook_step(lambda: None).__code__
_SCHEDULER_FILE = LRScheduler.step.__code__.co_filename


class Rule(NamedTuple):
    """The update rule that all parameter groups share.

    Attributes:
        family: ``"SGD"``, ``"RMSprop"``, ``"NormRMSprop"``, ``"Adam"`` or ``"AdamW"``.
        momentum: ``b``; Adam's ``beta1``.
        dampening: ``d``, which SGD alone has.
        nesterov: whether SGD looks ahead.
        maximize: whether the optimizer climbs, so that the objective is minus the loss.
    """

    family: str
    momentum: float
    dampening: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    @property
    def name(self) -> str:
        """For sentences."""
        return self.family + " with momentum" * (self.momentum > 0 and not self.family.startswith("Adam"))

    @property
    def adaptive(self) -> bool:
        """Whether the preconditioner follows the gradients."""
        return self.family != "SGD"

    @property
    def sign(self) -> float:
        """Of the loss in the objective that the optimizer descends."""
        return -1.0 if self.maximize else 1.0

    @property
    def is_euler(self) -> bool:
        """Whether one step is Euler's step of the flow, so that its error is defined."""
        return self.momentum == 0 and not self.family.startswith("Adam")

    @property
    def limit(self) -> float:
        """The stability limit on ``h * lambda``, without decoupled weight decay."""
        b = self.momentum
        if self.family.startswith("Adam"):
            return 2 * (1 + b) / (1 - b)
        return 2 * (1 + b) / (1 + 2 * b if self.nesterov else 1 - self.dampening)

    def damping_ratio(self, stiff: float) -> float | None:
        """Friction of heavy ball over the critical one, ``(1-b) / (2 sqrt((1-d) h lambda))``; below one it rings.

        Args:
            stiff: ``h lambda``, the rate times a curvature.
        """
        if self.adaptive or self.nesterov or not self.momentum or stiff <= 0:
            return None
        return (1 - self.momentum) / (2 * ((1 - self.dampening) * stiff) ** 0.5)


class Flow(NamedTuple):
    """The numbers of one step, right after it.

    Attributes:
        h: the largest learning rate of the groups.
        limit: the largest stable ``h * lambda``, decoupled weight decay included.
        rates: ``h_i / P`` of each parameter: a number, or a tensor shaped (and sharded) like it.
        decays: coupled weight decay of each parameter.
    """

    h: float
    limit: float
    rates: list[Tensor | float]
    decays: list[float]


def rule_of(optimizer: Optimizer) -> Rule | str:
    """The optimizer's rule, or why it has none that is known."""
    family = _family(optimizer)
    if family is None:
        return f"{type(optimizer).__name__} is none of SGD, RMSprop, Adam, AdamW and NormRMSprop with a step of its own"
    if len(parameters_of(optimizer)) < sum(len(group["params"]) for group in optimizer.param_groups):
        return f"{type(optimizer).__name__} lists a parameter twice in a group (tied weights), and so steps it twice"
    rules = {_rule_of_group(family, group) for group in optimizer.param_groups}
    if len(rules) > 1:
        return f"the parameter groups of {type(optimizer).__name__} differ in more than rate and weight decay"
    return rules.pop()


def _family(optimizer: Optimizer) -> str | None:
    """By the function that makes the step, so that a subclass or an instance with a step of its own is unknown."""
    step = type(optimizer).step
    if own := vars(optimizer).get("step"):  # torch's schedulers put theirs around the class's
        if getattr(own, "__code__", None) is None or own.__code__.co_filename != _SCHEDULER_FILE:
            return None
        step = own.__wrapped__
    known = {_bare(getattr(sys.modules[m], name).step): name for m, name in _FAMILIES.items() if m in sys.modules}
    return known.get(_bare(step))


def _bare(step: Callable[..., Any]) -> Callable[..., Any]:
    """Without the wrapper by which torch calls hooks; ``inspect.unwrap`` would believe any ``functools.wraps``."""
    while getattr(step, "__code__", None) is _HOOKED:
        step = step.__wrapped__
    return step


def _rule_of_group(family: str, group: dict[str, Any]) -> Rule:
    maximize = bool(group.get("maximize", False))
    if family.startswith("Adam"):
        decoupled = family == "AdamW" or group.get("decoupled_weight_decay", False)  # torch before 2.7: two classes
        return Rule("AdamW" if decoupled else "Adam", float(group["betas"][0]), maximize=maximize)
    momentum = float(group["momentum"])
    if family != "SGD" or not momentum:
        return Rule(family, momentum, maximize=maximize)
    return Rule(family, momentum, float(group["dampening"]), bool(group["nesterov"]), maximize)


def largest_rate(optimizer: Optimizer) -> float:
    """``h``, the largest learning rate of the groups."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def descent_sign(optimizer: Optimizer) -> float:
    """-1 if the optimizer, of whatever class, climbs the loss."""
    return -1.0 if all(group.get("maximize", False) for group in optimizer.param_groups) else 1.0


def why_unreadable(optimizer: Optimizer, scaled: bool, params: Sequence[Tensor]) -> str | None:
    """Why gradients before a step are not what they seem; ``None`` if they are.

    Args:
        optimizer: the optimizer, about to step.
        scaled: whether the run has a GradScaler.
        params: the parameters with a gradient.
    """
    if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
        return "a fused optimizer under a GradScaler hides unscaled gradients and skipped steps: use fused=False"
    if scaled and not calls_hooks(optimizer):
        return f"{type(optimizer).__name__} calls no hooks, so that steps which the GradScaler skips cannot be told"
    if any(p.grad.is_sparse or p.is_complex() for p in params):
        return "a parameter has a sparse or complex gradient"
    return None


def calls_hooks(optimizer: Optimizer) -> bool:
    """Whether its ``step`` calls those of torch: not if it only looks like an ``Optimizer`` to Lightning."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks")


class FlowTime:
    """How far the flow has come, in 1/curvature.

    Attributes:
        time: the sum of the flow times of all steps so far.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.time = 0.0
        # The buffer's value under a constant unit gradient; none yet, unless the optimizer was resumed.
        self._fill: float | None = None
        self._resumed = any(state.get("momentum_buffer") is not None for state in optimizer.state.values())

    def advance(self, optimizer: Optimizer, rule: Rule) -> None:
        """Add the step that was just made."""
        h, b = largest_rate(optimizer), rule.momentum
        if b == 0 or rule.family.startswith("Adam"):
            self.time += h
            return
        if self._fill is None:  # torch does not dampen the first gradient
            self._fill = (1 - rule.dampening) / (1 - b) if self._resumed else 1.0
        else:
            self._fill = b * self._fill + 1 - rule.dampening
        self.time += h * (1 + b * self._fill if rule.nesterov else self._fill)

    def state_dict(self) -> dict[str, Any]:
        """Time, and how full the momentum buffer is."""
        return {"time": self.time, "fill": self._fill}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.time, self._fill = state["time"], state["fill"]


def read_flow(optimizer: Optimizer, rule: Rule, params: Sequence[Tensor]) -> Flow:
    """The numbers of the step that was just made.

    Args:
        optimizer: the optimizer right after its step, so that the preconditioner is that of this step.
        rule: its rule, from :func:`rule_of`.
        params: the parameters that had a gradient, in any order.
    """
    groups = _groups(optimizer)
    h = largest_rate(optimizer)
    limit = rule.limit
    if rule.family == "AdamW":
        limit *= 1 - max(float(g["lr"]) * float(g["weight_decay"]) for g in optimizer.param_groups) / 2
    rates = [_rate(rule.family, groups[p], optimizer.state.get(p, {})) for p in params]
    coupled = rule.family != "AdamW"
    return Flow(h, limit, rates, [float(groups[p]["weight_decay"]) if coupled else 0.0 for p in params])


def _rate(family: str, group: dict[str, Any], state: dict[str, Any]) -> Tensor | float:
    h = float(group["lr"])
    if family == "SGD":
        return h
    if family == "NormRMSprop":
        return h / (float(state["mean_square_norm"]) ** 0.5 + group["eps"])
    if family == "RMSprop":
        v = state["square_avg"]
        if group["centered"]:
            v = v - state["grad_avg"] ** 2
    else:
        v = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        v = v / (1 - float(group["betas"][1]) ** float(state["step"]))
    return h / (torch.sqrt(v) + group["eps"])


def implicit_term(optimizer: Optimizer, rule: Rule, params: Sequence[Tensor]) -> list[tuple[float, float]] | None:
    r"""The coefficients of the term that the step size adds to the objective, for the SGD family.

    .. math:: \sum_i \phi(h_i) \, \| g_i + w_i \theta_i \|^2

    Returns:
        ``(phi(h_i), w_i)`` for each parameter; ``None`` for adaptive optimizers, whose implicit term is not a multiple
        of the squared gradient (Cattaneo et al. 2024).
    """
    if rule.adaptive:
        return None
    groups = _groups(optimizer)
    return [(implicit_coefficient(optimizer, groups[p]["lr"]), float(groups[p]["weight_decay"])) for p in params]


def _groups(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {param: group for group in optimizer.param_groups for param in group["params"]}
