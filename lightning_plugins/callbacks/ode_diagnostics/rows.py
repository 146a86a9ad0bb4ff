"""The rows of ODEDiagnostics: formulas on one optimizer step, without any trainer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plugins.callbacks.ode_diagnostics.optimizer_flow import Flow, Rule
from lightning_plugins.core.vectors import dot, local, norm

# A clipped gradient that is parallel to the raw one up to this, that is up to rounding, was clipped by its norm.
_SCALAR, _SCALAR_IN_HALF = 1e-6, 1e-4
LR = "lr-ODEDiagnostics"


@dataclass
class Step:
    """One optimizer step from ``theta`` to ``theta + move``.

    Attributes:
        gradient: ``g0``, the unclipped gradient of the objective at ``theta``.
        move: ``d``, by which the parameters moved.
        start_norm: ``|theta|``, a 0-dim tensor.
        clip_factor: norm of the clipped gradient over that of the raw one; ``None`` if unknown.
        turned: whether clipping changed the gradient's direction too.
        sign: -1 where the optimizer climbs, else 1.
        gradient_norm: ``|g0|``; ``None`` if it is yet to be computed.
    """

    gradient: list[Tensor]
    move: list[Tensor]
    start_norm: Tensor
    clip_factor: float | None = None
    turned: bool = False
    sign: float = 1.0
    gradient_norm: float | None = None


def clipping(
    raw: Sequence[Tensor] | None, raw_norm: float, clipped: Sequence[Tensor | None]
) -> tuple[float | None, bool]:
    """Factor of the norm, ``None`` if unknown, and whether the direction has changed (where ``raw`` is given)."""
    if not 0 < raw_norm < math.inf or any(grad is None for grad in clipped):
        return None, False
    clipped_norm = norm(clipped).item()
    turned = False
    if raw is not None and 0 < clipped_norm != raw_norm:  # equal to the last bit: nothing was clipped
        half = any(grad.dtype in (torch.float16, torch.bfloat16) for grad in raw)
        cosine = dot(raw, clipped).item() / (raw_norm * clipped_norm)
        turned = cosine < 1 - (_SCALAR_IN_HALF if half else _SCALAR)
    return clipped_norm / raw_norm, turned


def start_rows(
    gradient: float, clip_factor: float | None, loss: float | None, implicit: float | None
) -> dict[str, float]:
    """What is known without looking at the move.

    Args:
        gradient: the raw gradient's norm ``|g0|``.
        clip_factor: norm of the clipped gradient over that of the raw one; ``None`` if unknown.
        loss: the raw loss; ``None`` where it is not known.
        implicit: the implicit term of an unclipped step; ``None`` where the optimizer has none.
    """
    rows = {"grad_norm": gradient, "clip_factor": clip_factor, "loss": loss}
    if implicit is not None and (clip_factor is None or clip_factor > 1 - _SCALAR):
        rows["igr_term"] = implicit
        if loss is not None and loss > 0:
            rows["igr_ratio"] = implicit / loss
    return {name: value for name, value in rows.items() if value is not None}


def first_order_rows(step: Step) -> dict[str, float]:
    """What the move and the gradient at its start tell, for any optimizer."""
    length, slope = norm(step.move).item(), dot(step.gradient, step.move).item()
    gradient = norm(step.gradient).item() if step.gradient_norm is None else step.gradient_norm
    rows = {"update_norm": length, "predicted_dloss": slope}
    if start := step.start_norm.item():
        rows["rel_update"] = length / start
    if gradient > 0:
        rows["effective_lr"] = -step.sign * slope / gradient**2
        if length > 0:
            rows["cos_descent"] = -step.sign * slope / (length * gradient)
    return rows


def second_order_rows(step: Step, change: Sequence[Tensor]) -> dict[str, float]:
    """What the change of the gradient along the move, ``g1 - g0``, adds for any optimizer."""
    slope, bend = dot(step.gradient, step.move).item(), dot(change, step.move).item()
    rows = {"predicted2_dloss": slope + bend / 2}
    if square := dot(step.move, step.move).item():
        rows["curvature_step"] = bend / square
    return rows


def loss_rows(step: Step, change: float) -> dict[str, float]:
    """The loss's change in the step, and its share of what the gradient predicted."""
    slope = dot(step.gradient, step.move).item()
    return {"actual_dloss": change} | ({"dloss_ratio": change / slope} if slope else {})


def flow_rows(step: Step, change: Sequence[Tensor], flow: Flow, rule: Rule, tol: float | None) -> dict[str, float]:
    """What is said of the step as a solver's: edge ratio along it, and for Euler steps the local error.

    Args:
        step: the optimizer step.
        change: change of the gradient along it, ``g1 - g0``.
        flow: the optimizer's numbers in this step.
        rule: the optimizer's rule.
        tol: relative local error that ``lr_for_tol`` allows; ``None`` leaves that row out.
    """
    rows, length = {}, norm(step.move).item()
    if not (flow.h > 0 and length > 0):
        return rows
    # the objective that the optimizer descends: it climbs by descending -L, and coupled decay adds w |theta|^2 / 2
    bend = _bend(step, change, flow, step.sign)
    inverse = divided(step.move, flow.rates)
    rows["edge_ratio_step"] = dot(step.move, bend).item() / dot(step.move, inverse).item() / flow.limit
    if rule.is_euler and not step.turned:
        clipped = min(1.0, step.clip_factor or 1.0)
        bend = _bend(step, change, flow, step.sign * clipped)
        error = norm([rate * b for rate, b in zip(flow.rates, bend, strict=True)]).item() / 2
        rows |= {"local_error": error, "rel_local_error": error / length}
        if tol is not None and error > 0:
            rows["lr_for_tol"] = flow.h * tol * length / error
    return rows


def _bend(step: Step, change: Sequence[Tensor], flow: Flow, factor: float) -> list[Tensor]:
    return [factor * y + w * d for y, w, d in zip(change, flow.decays, step.move, strict=True)]


def divided(vector: Sequence[Tensor], rates: Sequence[Tensor | float]) -> list[Tensor]:
    """``vector / rates``; coordinates at rate zero, which do not move, as they are."""
    return [part / (rate + (rate == 0)) for part, rate in zip(vector, rates, strict=True)]


def implicit_sum(coefficients: Sequence[tuple[float, float]], params: Sequence[Tensor], sign: float) -> Tensor:
    """``sum_i phi_i |sign * g_i + w_i theta_i|^2`` over parameters with gradients; 0-dim float64."""
    parts: dict[tuple[float, float], list[Tensor]] = {}
    for key, param in zip(coefficients, params, strict=True):
        parts.setdefault(key, []).append(param)
    total = torch.zeros((), dtype=torch.float64, device=local(params)[0].device)
    for (coefficient, decay), group in parts.items():
        gradient = [p.grad if not decay else sign * p.grad + decay * p.detach() for p in group]
        total = total + coefficient * norm(gradient) ** 2
    return total


def sharpness_rows(value: float, flow: Flow, rule: Rule, along: float | None) -> dict[str, float]:
    """What the top eigenvalue ``h lambda`` tells.

    Args:
        value: the largest eigenvalue of ``rates^1/2 H rates^1/2``, that is ``h lambda``.
        flow: the optimizer's numbers in this step.
        rule: the optimizer's rule.
        along: the edge ratio along the step; ``None`` where the step has none.
    """
    rows = {"sharpness": value / flow.h, "edge_ratio": value / flow.limit}
    if along:
        rows["stiffness"] = rows["edge_ratio"] / abs(along)
    damping = rule.damping_ratio(value)
    return rows if damping is None else rows | {"damping_ratio": damping}


class EdgeWatch:
    """Notices edge ratios that stay above one, once."""

    _PATIENCE = 3  # probes in a row

    def __init__(self) -> None:
        self._above = {"ode/edge_ratio": 0, "ode/edge_ratio_step": 0}
        self._told = False

    def sentence(self, rows: Mapping[str, float], rule: Rule) -> str | None:
        """What to warn of after this probe."""
        for name in self._above.keys() & rows.keys():
            self._above[name] = self._above[name] + 1 if rows[name] > 1 else 0
        beyond = [name for name, probes in self._above.items() if probes >= self._PATIENCE and name in rows]
        if not beyond or self._told:
            return None
        self._told = True
        name, ratio = beyond[0], rows[beyond[0]]
        effect = "v adapts to it, so that this need not diverge" if rule.adaptive else "expect oscillation along it"
        where = "in the sharpest direction" if name == "ode/edge_ratio" else "along the step"
        return (
            f"the learning rate stays above its stability limit {where} ({name} = {ratio:.2f}, above 1 in several "
            f"probes in a row): {effect}. A rate {ratio:.2g} times smaller is at the limit; see suggest_lr()."
        )


def as_columns(history: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """A table with one row for each step, of several for one step the last; NaN where there is no value."""
    rows = {row["step"]: row for row in history}
    names = dict.fromkeys(name for row in rows.values() for name in row)
    return {name: [row.get(name, math.nan) for row in rows.values()] for name in names}


def suggested_lr(history: Sequence[Mapping[str, float]], rule: Rule | str | None, tol: float | None) -> float:
    """What ``ODEDiagnostics.suggest_lr`` returns; ``rule`` is ``None`` before any training."""
    if tol is not None and (error := _median_per_rate(history, "ode/rel_local_error") or 0.0) > 0:
        return tol / error
    edge = _median_per_rate(history, "ode/edge_ratio")
    is_euler = isinstance(rule, Rule) and rule.is_euler
    if edge is None and is_euler:
        edge = _median_per_rate(history, "ode/edge_ratio_step")
    if edge is not None and edge > 0:
        if tol is not None:
            why = "no local error above zero was seen" if is_euler else "steps with momentum have no local error"
            rank_zero_warn(f"suggest_lr() suggests by stability, not by tol={tol:g}: {why}.")
        return 0.5 / edge
    raise RuntimeError(f"suggest_lr() needs a probe with a positive edge ratio: {_cure(history, rule, edge)}.")


def _median_per_rate(history: Sequence[Mapping[str, float]], name: str) -> float | None:
    """Of ``value / learning rate``: where the value is not positive any rate would do, and that counts."""
    values = [row[name] / row[LR] for row in history if name in row]
    return median(values) if values else None


def _cure(history: Sequence[Mapping[str, float]], rule: Rule | str | None, edge: float | None) -> str:
    if isinstance(rule, str):
        return f"{rule}, so that its edge is not known"
    if edge is not None:
        return "most saw no positive curvature, so that nothing limits the rate; train longer, or choose it by hand"
    if rule is not None and any("ode/predicted2_dloss" in row for row in history):
        return f"the edge along the step says too little for {rule.name}; give sharpness_every_n_steps"
    return "there was none; train for more than every_n_steps steps, with automatic optimization"
