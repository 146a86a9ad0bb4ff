"""Flooding: training keeps the loss around a level instead of driving it to zero, for any module."""

import math
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.callbacks.flooding.loss import check_level
from lightning_plugins.callbacks.piecewise import Points, check_points, value_at
from lightning_plugins.callbacks.run_checks import (
    NeedsTrainer,
    OneGradientPerStep,
    put_in_order,
    require_automatic_optimization,
    require_descent,
    require_plain_optimizers,
    require_strategy,
)
from lightning_plugins.core import arguments as must
from lightning_plugins.core.lightning_internals import skips_backward
from lightning_plugins.core.optimizers import parameters_of
from lightning_plugins.core.vectors import local, mean_over_ranks_
from lightning_plugins.replay.recorder import StepRecorder

Scope = Literal["step", "microbatch"]
_CURE = "call flood(losses, level) in training_step"


class Flooding(NeedsTrainer):
    r"""Train on |L - b| + b: descend while the loss is above the level b, ascend while it is below.

    .. math::
        \text{scope="step":}\quad |L - b| + b, \qquad
        \text{scope="microbatch":}\quad \frac{1}{n} \sum_{i=1}^n |\ell_i - b| + b, \qquad
        L = \frac{1}{n} \sum_i \ell_i

    where ``i`` runs over the micro-batches of one optimizer step on all ranks, and :math:`\ell_i` is what
    ``training_step`` returned. So the gradient is multiplied by +1 or -1 (+1 at the level itself). The step form looks
    at the effective batch, however it is spread over ranks and micro-batches; the other lets each micro-batch of each
    rank decide for itself. With accumulation, ranks and micro-batches count alike, and a window that an epoch's end
    cuts short is divided by the full ``accumulate_grad_batches``, as Lightning does: its gradient is ``n / k`` of the
    one above.

    Signs are applied before clipping. The loss that the module returned, logs or monitors stays the raw one, and
    nothing waits for its value. With :class:`GradientPenalty` in the same trainer, in any order, the objective is
    ``F + c |grad F|^2`` with ``F`` from above, so ``|L - b| + b + c |grad L|^2`` for the step form. Weight decay of
    the optimizer never ascends. An optimizer with ``maximize=True`` is refused: what it maximises would be kept away
    from the level. In manual optimization, and for single samples, use :func:`flood`.

    Cost: 0.2 to 0.3 ms of CPU time a step, and with several ranks one more message of one number.

    Logs (every ``log_every_n_steps``): ``flood/level`` (``-inf`` before ``start``), ``flood/raw_loss`` (``L``),
    ``flood/active`` (1 if the step ascended, else 0; with ``scope="microbatch"`` the share of micro-batches).

    All depends on the trainer's counters and the present losses alone, so that a resumed run needs no state of its own.
    Lightning's finders of learning rates and batch sizes search without it: they replace the trainer's callbacks while
    they do. The epoch in which ``StochasticWeightAveraging`` renews the statistics of batch norm is left alone.

    Args:
        level: the loss that training keeps to, in units of what training_step returns, whatever the accumulation, loss
            scale or number of ranks; chosen by validation. Minus infinity (-.inf on the command line and in YAML)
            trains bit for bit as without the callback. Give level or level_schedule, not both.
        scope: whose loss decides between descent and ascent: "step" takes one sign from the mean loss of the effective
            batch, "microbatch" one for each micro-batch on each rank.
        level_schedule: pairs [step, level] with growing optimizer steps and finite levels, linear between the steps,
            constant before the first and after the last.
        start: when flooding begins: "immediately", "epoch 5" (when five epochs have passed) or "step 1000" (when a
            thousand optimizer steps have). Training is plain before.

    Attributes:
        sign: 0-dim tensor, the step's sign: +1 or -1 from this callback's ``on_before_optimizer_step`` on, until the
            next step's. Always +1 with ``scope="microbatch"``, where the sign is each recorded call's.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: before training, for a setup in which the objective would not be this one.

    Source:
        Ishida et al., Do We Need Zero Training Loss After Achieving Zero Training Error?, ICML 2020 (the micro-batch
        form, for one batch). Two steps of size ``h``, one up and one down, move the weights by
        ``-(h^2 / 2) grad |grad L|^2`` up to third order (Karakida et al., Understanding Gradient Regularization,
        ICML 2023).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[Flooding(0.05)], logger=False, accelerator="cpu")
    """

    gradient_order = 0

    def __init__(
        self,
        level: float | None = None,
        scope: Scope = "step",
        level_schedule: Points | None = None,
        start: str = "immediately",
    ) -> None:
        if (level is None) == (level_schedule is None):
            told = f"level={must.told(level)} and level_schedule={must.told(level_schedule)}"
            raise ValueError(f"Give either level or level_schedule, got {told}.")
        if level is not None:
            check_level("level", level)
        must.one_of(Scope)("scope", scope)
        check_points("level_schedule", level_schedule)
        if level_schedule is not None and not all(math.isfinite(value) for _, value in level_schedule):
            raise ValueError(
                f"level_schedule={must.told(level_schedule)} must have finite levels: to begin later, give "
                "start='step N'."
            )
        self.level, self.scope, self.level_schedule, self.start = level, scope, level_schedule, start
        self._unit, self._first = _parse_start(start)
        self.sign = torch.ones(())
        self._recorder: StepRecorder | None = None

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place before GradientPenalty."""
        if stage == "fit":
            put_in_order(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what would train something else."""
        if sum(isinstance(callback, Flooding) for callback in trainer.callbacks) > 1:
            raise MisconfigurationException("Only one Flooding in a trainer, their signs would multiply: remove one.")
        require_automatic_optimization("Flooding", pl_module, _CURE)
        require_strategy("Flooding", trainer)
        require_plain_optimizers("Flooding", trainer)
        self._one_gradient = OneGradientPerStep("Flooding(scope='step')")
        self.sign = torch.ones((), device=trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to remember losses."""
        require_descent("Flooding", trainer, "return minus that objective, and flood it at minus the level")
        self._recorder = StepRecorder.attach(trainer, pl_module, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give ``training_step`` back."""
        if self._recorder is not None:
            self._recorder.detach(self)
            self._recorder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give ``training_step`` back."""
        self.teardown(trainer, pl_module, "fit")

    # During training

    def level_at(self, trainer: Trainer) -> float:
        """The level of the optimizer step under way; ``-inf`` before ``start``."""
        if (trainer.current_epoch if self._unit == "epoch" else trainer.global_step) < self._first:
            return -math.inf
        return self.level if self.level_schedule is None else value_at(self.level_schedule, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Refuse a module that has turned to manual optimization since training began."""
        require_automatic_optimization("Flooding", pl_module, _CURE)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Micro-batches: multiply the gradient at its root."""
        level = self.level_at(trainer)
        if self.scope == "step" or level == -math.inf:
            return
        sign = _sign(self._recorder.losses[-1], level)
        loss.register_hook(lambda grad: grad * sign.to(grad.dtype))
        if len(self._recorder.calls) == len(self._recorder.losses):
            self._recorder.calls[-1].sign = sign

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Steps: multiply what the optimizer is about to use."""
        self.sign = torch.ones_like(self.sign)
        if skips_backward(trainer):
            return
        if self.scope == "step":
            self._one_gradient.check(trainer)
        if not self._recorder.losses:  # training_step returned None
            return
        level = self.level_at(trainer)
        if self.scope == "step" and level != -math.inf:
            self._apply(optimizer, level)
        if trainer.log_every_n_steps and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            self._log(pl_module, level)

    def _apply(self, optimizer: Optimizer, level: float) -> None:
        loss = self._losses().mean()
        mean_over_ranks_([loss])
        self.sign = _sign(loss, level)
        grads = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        if grads:  # else nothing depends on the parameters
            torch._foreach_mul_(local(grads), self.sign)
        for call in self._recorder.calls:
            call.sign = self.sign

    def _log(self, pl_module: LightningModule, level: float) -> None:
        losses = self._losses()
        ascends = self.sign < 0 if self.scope == "step" else losses < level
        loss, active = losses.mean(), ascends.to(losses.dtype).mean()
        mean_over_ranks_([loss, active])
        logs = {"flood/level": level, "flood/active": active, "flood/raw_loss": loss}
        pl_module.log_dict(logs, batch_size=1)  # its size is only asked of modules that draw their own batches

    def _losses(self) -> Tensor:
        """Of the window's micro-batches on this rank."""
        return torch.stack([_widened(loss) for loss in self._recorder.losses])


def _widened(loss: Tensor) -> Tensor:
    """A number in at least fp32, so that the level is not rounded to the loss's precision."""
    return loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))


def _sign(loss: Tensor, level: float) -> Tensor:
    """+1 or -1 as a tensor, for nobody to wait for its value; +1 if the loss is not a number."""
    return torch.where(_widened(loss) < level, -1.0, 1.0)


def _parse_start(start: str) -> tuple[str, int]:
    """The unit and the number of what has to pass."""
    must.text("start", start)
    unit, _, number = start.partition(" ")
    if start == "immediately":
        return "step", 0
    if unit in ("epoch", "step") and number.isdecimal() and len(number) < 19:
        return unit, int(number)
    raise ValueError(f"start={must.told(start)} must be 'immediately', 'epoch N' or 'step N'.")
