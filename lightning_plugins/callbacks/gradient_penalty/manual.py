"""The gradient penalty inside a training_step of one's own (manual optimization)."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_plugins.callbacks.checked_steps import CheckedSteps
from lightning_plugins.callbacks.gradient_penalty.exact import ExactPenalty, add_by_hooks
from lightning_plugins.callbacks.gradient_penalty.repeatable import check_repeatable
from lightning_plugins.callbacks.gradient_penalty.rules import (
    check_relative_step,
    require_full_precision,
    require_plain_gradients,
)
from lightning_plugins.callbacks.gradient_penalty.term import PenaltyNorm, descend_, weigh_
from lightning_plugins.callbacks.run_checks import require_strategy
from lightning_plugins.core import arguments as must
from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.lightning_internals import loss_scale
from lightning_plugins.core.optimizers import maximized
from lightning_plugins.core.random_state import get_random_state
from lightning_plugins.core.vectors import foreach_add_, local
from lightning_plugins.core.vectors import norm as length_of
from lightning_plugins.replay.differences import Difference, Displacement, best_displacement, step_along
from lightning_plugins.replay.graph import half_precision, has_kinks
from lightning_plugins.replay.missing_terms import ask
from lightning_plugins.replay.module_state import ModuleState
from lightning_plugins.replay.recorder import Call
from lightning_plugins.replay.twice import Arrivals, explain, look_into, why_not_exact
from lightning_plugins.replay.window import WindowLoss

Engine = Literal["finite_difference", "exact"]

_NAME = "gradient_penalty_backward"
_PARAMETERS = must.Rule(
    lambda value: isinstance(value, Iterable) and not (isinstance(value, Tensor) and not value.ndim), "parameters"
)
_asked: WeakKeyDictionary[LightningModule, set[str]] = WeakKeyDictionary()  # which custom functions were compared
_checks: WeakKeyDictionary[LightningModule, dict[Any, CheckedSteps]] = WeakKeyDictionary()  # by module and function


def gradient_penalty_backward(
    module: LightningModule,
    loss_fn: Callable[[], Tensor],
    coefficient: float,
    params: Iterable[nn.Parameter] | None = None,
    norm: PenaltyNorm = "squared",
    engine: Engine = "finite_difference",
    difference: Difference | Literal["auto"] = "auto",
    relative_step: float | Literal["auto"] = "auto",
) -> Tensor:
    r"""Backward pass of a loss plus a penalty on the norm of its gradient, for manual optimization.

    .. math:: L + c \|\nabla_{\theta} L\|^2 \quad\text{or}\quad L + c \|\nabla_{\theta} L\|

    with ``L`` the mean over ranks. Gradients are added to those that are there already, so that several losses may
    share a step. The cost is that of :class:`GradientPenalty`. With finite differences the first call of a ``loss_fn``,
    the second, fourth, eighth and so on run it once more, to see whether it can be repeated.
    Parameters that one of the module's optimizers moves up the gradient (``maximize=True``) get minus the penalty's
    gradient: they climb the loss and descend the penalty.

    Args:
        module: the module that trains, with ``automatic_optimization = False``.
        loss_fn: computes the loss, a scalar, and all that depends on ``params`` within it; it is called again at
            displaced parameters, with the same random numbers and buffers, and must use the same data each time.
        coefficient: the factor ``c``, 0 or more, in units of 1 / curvature (squared) or loss / gradient (norm); 0 is
            ``manual_backward(loss_fn())``.
        params: ``theta``, such as one optimizer's parameters; by default all trainable parameters of the module. Others
            get the loss's gradient.
        norm: ``"squared"`` penalises ``|grad L|^2``, ``"norm"`` penalises ``|grad L|``.
        engine: ``"finite_difference"`` calls ``loss_fn`` again at displaced parameters, ``"exact"`` differentiates
            twice, and raises where the backward pass brings another gradient than the loss's graph shows, or a custom
            function's backward cannot be differentiated: finite differences tell in the first call that meets it.
        difference: ``"forward"`` errs by first order in the displacement, ``"central"`` by second, for one more call;
            ``"auto"`` is central where the loss has kinks or is computed in half precision, else forward.
        relative_step: displacement over ``|theta|``, between 0 and 1; ``"auto"`` takes the best measured for the
            precision of the loss, and a larger one where the names of its operations tell of kinks. Nothing is
            measured here: for a loss with other kinks (``torch.where``, rounding) and for parameters that start from
            zero give a number, such as 0.01 with ``difference="central"``.

    Returns:
        The loss, without the penalty, detached.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: a setup in which the gradients would be wrong.
        RuntimeError: ``loss_fn`` cannot be repeated, or not be differentiated twice.

    Example:
        A generator's step within ``training_step``::

            optimizer.zero_grad()
            gradient_penalty_backward(self, lambda: self.generator_loss(noise), 0.1, self.generator.parameters())
            optimizer.step()
    """
    must.check(
        locals(),
        norm=must.one_of(PenaltyNorm),
        engine=must.one_of(Engine),
        difference=must.one_of(Literal["auto", Difference]),
        module=must.instance(LightningModule, "a LightningModule"),
        loss_fn=must.function,
        coefficient=must.non_negative,
        params=must.optional(_PARAMETERS),
    )
    check_relative_step(relative_step)
    if module.automatic_optimization:
        raise ValueError(
            f"{_NAME} is for manual optimization, but {type(module).__name__} has automatic_optimization=True: add "
            "the callback GradientPenalty to the trainer instead."
        )
    require_strategy(_NAME, module.trainer)
    require_full_precision(_NAME, module.trainer)
    require_plain_gradients(_NAME, module.trainer, module)
    params = _trainable(module.parameters() if params is None else params)
    device = module.trainer.strategy.root_device
    call = Call(loss_fn, device, get_random_state(device), ModuleState(module, params))
    with call.watched(module):
        loss = _scalar(loss_fn())
    if coefficient == 0:
        module.manual_backward(loss)
    elif engine == "exact":
        _exact(module, loss, call, params, coefficient, norm)
    else:
        kinked, half = has_kinks(loss, module), half_precision(loss)
        displacement = best_displacement(module.trainer, module, difference, kinked, half)
        if relative_step != "auto":
            displacement = Displacement(displacement.difference, relative_step)
        _by_replay(module, loss, call, params, coefficient, norm, displacement, _checks_of(module, loss_fn))
    return loss.detach()


def _trainable(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    params = list(params)
    for param in params:
        if not isinstance(param, Tensor) or not param.is_leaf:  # the rows of a parameter are no leaves
            raise ValueError(
                f"{_NAME}: params must be a list of parameters, got one with a {type(param).__name__}: of an optimizer "
                "they are [p for group in optimizer.param_groups for p in group['params']]."
            )
    trainable = list(dict.fromkeys(param for param in params if param.requires_grad))
    if not trainable:
        raise ValueError(
            f"{_NAME}: none of the {len(params)} params is trainable, so that there is no gradient to penalise: give "
            "parameters with requires_grad=True."
        )
    return trainable


def _checks_of(module: LightningModule, loss_fn: Callable[[], Tensor]) -> CheckedSteps:
    """The checks of a function, which a training_step may make anew in each call."""
    key = getattr(loss_fn, "__code__", type(loss_fn))
    return _checks.setdefault(module, {}).setdefault(key, CheckedSteps("steps", unit="call"))


def _climbing(module: LightningModule) -> set[Tensor]:
    """Parameters that one of the module's optimizers moves up the gradient."""
    optimizers = module.optimizers(use_pl_optimizer=False)
    return maximized(*(optimizers if isinstance(optimizers, list) else [optimizers]))


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"{_NAME}: loss_fn must return a single number, got {found}: take the mean.")
    return loss


def _exact(
    module: LightningModule,
    loss: Tensor,
    call: Call,
    params: list[nn.Parameter],
    coefficient: float,
    norm: PenaltyNorm,
) -> None:
    """Differentiate twice; hooks scale the result as the loss is scaled, and DDP averages the sum."""
    if reason := why_not_exact(module.trainer, module):
        raise ValueError(f"{_NAME}(engine='exact') is not possible: {reason}.")
    scale_now = loss_scale(module.trainer)
    arrivals = None
    try:
        functions, precision = look_into(loss)
        penalty = ExactPenalty(loss * scale_now, params, scale_now, coefficient, norm, joined=True)
        descend_(extras := penalty.extras(), params, _climbing(module))
        # listens from before the hooks that add the penalty to what arrives
        arrivals = Arrivals(penalty.first, params, module, precision)
        handles = add_by_hooks(params, extras)
        try:
            module.manual_backward(loss)
        finally:
            for handle in handles:
                handle.remove()
        arrivals.check()
        _ask(module, call, params, functions, has_kinks(loss, module), half_precision(loss))
    except RuntimeError as error:
        raise RuntimeError(f"{_NAME}(engine='exact'): {explain(error)}.") from error
    finally:
        if arrivals is not None:
            arrivals.close()


def _ask(
    module: LightningModule,
    call: Call,
    params: list[nn.Parameter],
    functions: set[str],
    kinked: bool,
    half: torch.dtype | None,
) -> None:
    """Ask finite differences about each custom function once, when a loss first has it in its graph."""
    asked = _asked.setdefault(module, set())
    if not largest_over_ranks(len(functions - asked), module.device):
        return
    asked |= functions
    window = WindowLoss(module.trainer, module, [call], params)
    found = ask(module.trainer, module, window, functions, window.gradient()[1], kinked, half)
    if found:
        rank_zero_warn(f"{_NAME}(engine='exact'): {found}.")


def _by_replay(
    module: LightningModule,
    loss: Tensor,
    call: Call,
    params: list[nn.Parameter],
    coefficient: float,
    norm: PenaltyNorm,
    displacement: Displacement,
    checks: CheckedSteps,
) -> None:
    """The gradient, the check, the gradient at displaced parameters, the product, their sum."""
    before = [None if param.grad is None else param.grad.clone() for param in params]  # DDP may reuse their memory
    for param in params:
        param.grad = None
    module.manual_backward(loss)
    trained = [param for param in params if param.grad is not None]
    if trained:
        window = WindowLoss(module.trainer, module, [call], trained)
        gradient = [param.grad for param in trained if param.grad is not None]
        window.unscale_(gradient)
        length = length_of(gradient)
        with _explained():
            _check(module, window, gradient, length, displacement, checks)
            step = step_along(trained, gradient, displacement)
            product = None if step is None else window.product(gradient, step.size, displacement.difference, gradient)
        if product is not None:
            weigh_(product, norm, coefficient, length)
            descend_(product, trained, _climbing(module))
            foreach_add_(local(gradient), local(product))
        window.scale_(gradient)
    for param, old in zip(params, before, strict=True):
        if old is not None:
            param.grad = old if param.grad is None else param.grad.add_(old)


def _check(
    module: LightningModule,
    window: WindowLoss,
    gradient: list[Tensor],
    length: Tensor,
    displacement: Displacement,
    checks: CheckedSteps,
) -> None:
    """Now and then: a second run must give the same gradient."""
    if checks.due() and 0 < length.item() < math.inf:
        cure = "use engine='exact', which runs it once"
        again, when = window.gradient()[1], checks.history()
        check_repeatable(module, gradient, again, displacement.relative, when, _NAME, "loss_fn", cure)
        checks.passed()


@contextmanager
def _explained() -> Iterator[None]:
    """Tell what torch's error means when the loss was not computed anew."""
    try:
        yield
    except RuntimeError as error:
        if "through the graph a second time" not in str(error):
            raise
        raise RuntimeError(
            f"{_NAME} calls loss_fn again at displaced parameters, but a part of its graph was made outside: compute "
            "everything that depends on params inside loss_fn."
        ) from error
