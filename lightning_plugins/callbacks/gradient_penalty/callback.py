"""Implicit gradient regularisation made explicit: a penalty on the norm of the loss's gradient, for any module."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.callbacks.flooding.callback import Flooding
from lightning_plugins.callbacks.gradient_penalty.first_step import check_repeatable, extent, is_resolved
from lightning_plugins.callbacks.gradient_penalty.rules import Check, Engine, Scope, check_arguments, refuse_setup
from lightning_plugins.callbacks.gradient_penalty.term import PenaltyNorm, size, weigh_
from lightning_plugins.callbacks.implicit_regularization import implicit_coefficient, require_sgd
from lightning_plugins.callbacks.piecewise import Points, value_at
from lightning_plugins.callbacks.run_checks import OneGradientPerStep, put_in_order
from lightning_plugins.core.lightning_internals import loss_scale, skips_backward
from lightning_plugins.core.vectors import local, mean_over_ranks_, norm
from lightning_plugins.replay.differences import Difference, relative_step, step_along
from lightning_plugins.replay.recorder import StepRecorder
from lightning_plugins.replay.twice import explain, second_derivative, why_not_exact
from lightning_plugins.replay.window import WindowLoss


class Penalised(NamedTuple):
    """What is logged of a penalised step.

    Attributes:
        lengths: of the gradients that were penalised on this rank, 0-dim tensors.
        loss: mean over this rank's micro-batches.
        coefficient: ``c``.
        relative_step: displacement over the parameters' norm; ``None`` for exact products.
    """

    lengths: list[Tensor]
    loss: Tensor
    coefficient: float
    relative_step: float | None


class GradientPenalty(Callback):
    r"""Train on the loss plus a penalty on the norm of its gradient, without touching the module.

    .. math::
        \text{scope="step":}\quad L + c \|\nabla L\|^2, \qquad
        \text{scope="microbatch":}\quad L + \frac{c}{n} \sum_{i=1}^n \|\nabla \ell_i\|^2, \qquad
        L = \frac{1}{n} \sum_i \ell_i

    where ``i`` runs over the micro-batches of one optimizer step on all ranks. Gradient descent with step ``h`` follows
    the flow of ``L + h/4 |grad L|^2`` (Barrett and Dherin 2021); SGD that of the micro-batch form (Smith et al. 2021),
    so ``c = h/4`` adds as much again. The step form does not depend on how a batch is spread over ranks and
    micro-batches; the other penalises the gradients' variance too, and is another objective. Decoupled or coupled
    weight decay is the optimizer's, not part of ``L``.

    The penalty is added to the gradients before clipping. Losses, logs, metrics, batch-norm statistics and random
    numbers are those of a run without the callback. With :class:`Flooding` in the same trainer, in any order, the
    objective is ``|L - b| + b + c |grad L|^2``.

    Cost of a step, plain = 1: finite differences forward about 2, central 3 (one more with ``scope="microbatch"`` under
    accumulation or several ranks); exact 4 to 5, and two to three times the memory. Finite differences keep two copies
    of the trained parameters (four with ``scope="microbatch"`` and more than one), and for each micro-batch copies of
    its batch and of the module's state (buffers, and networks that are not trained unless they are far larger than what
    is). Lightning's finders of learning rate and batch size take all callbacks away while they search.

    Logs (every ``log_every_n_steps``): ``igr/coefficient``, ``igr/grad_norm_sq``, ``igr/penalty`` (``c`` times the
    norm), ``igr/penalty_ratio`` (penalty / loss), ``igr/relative_step``.

    Args:
        coefficient: the penalty's factor c, 0 or more, in units of 1 / curvature for the squared norm and of loss /
            gradient for the norm itself. 0 trains bit for bit as without the callback. Give coefficient or match_lr,
            not both.
        match_lr: a learning rate whose implicit regularisation training is to carry: the coefficient makes up for what
            the present, scheduled rate lacks, and is zero, with a warning, while that rate is higher. It needs
            torch.optim.SGD, with or without momentum.
        norm: what is penalised: "squared" adds c |grad L|^2 (Barrett and Dherin 2021); "norm" adds c |grad L| (Zhao et
            al. 2022), which is SAM with rho = c if c is relative_step times the parameters' norm and the difference is
            forward.
        engine: how the penalty's gradient is computed. "finite_difference" runs the step's batches again at displaced
            parameters; it works with fused attention, compiled modules and FSDP2. "exact" differentiates twice; a
            custom function whose backward builds no graph counts as constant there. "auto" is exact where that is
            possible, with one warning where it is not.
        scope: whose gradient is penalised: "step" takes that of the whole effective batch, "microbatch" that of each
            micro-batch on each rank.
        difference: which finite difference is taken: the error of "forward" is of first order in the displacement,
            that of "central" of second, for one more pass.
        relative_step: the displacement divided by the norm of the parameters, between 0 and 1. "auto" takes the best
            measured for the precision of the forward pass: fp32 1e-4 forward, 1e-3 central; bf16 3e-2 and 1e-1; fp16
            and TF32 1e-2 and 3e-2. Where the loss has kinks (ReLU, max-pooling) it takes at least 3e-2 forward and 1e-2
            central: a unit that crosses its kink within a tiny step adds a jump divided by that step, which destroys
            training. The penalty then is that of the loss smoothed over the step, and differs from the exact one, which
            does not see kinks. A loss that bends within such steps (attention logits in the hundreds) needs a smaller
            step or engine="exact".
        every_n_steps: the penalty is added in every n-th optimizer step only; 1 or more. The coefficient is not
            scaled: on average over steps the objective has c / n.
        warmup_steps: number of optimizer steps over which the coefficient grows linearly from zero; 0 or more.
        schedule: pairs [step, factor] for the coefficient, with growing optimizer steps and factors of 0 or more;
            linear between the steps, constant before the first and after the last. None is a factor of 1.
        check: what is asked of the first penalised step. "first_step" runs it again at the unmoved parameters and
            raises if that gives another gradient, as a training_step does that cannot be repeated; and looks whether
            half the automatic step gives the same Hessian product: if not, it warns and takes the step for kinks. "off"
            asks nothing.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: before training, for a setup in which the penalty would not be this one.

    Source:
        Barrett and Dherin, Implicit Gradient Regularization, ICLR 2021, eq. 3 to 5; Smith et al., On the Origin of
        Implicit Regularization in SGD, ICLR 2021, eq. 5; Zhao et al., Penalizing Gradient Norm, ICML 2022;
        Karakida et al., Understanding Gradient Regularization, ICML 2023 (finite differences).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradientPenalty(0.1)], logger=False, accelerator="cpu")
    """

    gradient_order = 1

    def __init__(
        self,
        coefficient: float | None = None,
        match_lr: float | None = None,
        norm: PenaltyNorm = "squared",
        engine: Engine = "finite_difference",
        scope: Scope = "step",
        difference: Difference = "forward",
        relative_step: float | Literal["auto"] = "auto",
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        schedule: Points | None = None,
        check: Check = "first_step",
    ) -> None:
        self.coefficient, self.match_lr, self.schedule = coefficient, match_lr, schedule
        self.norm: PenaltyNorm = norm
        self.engine: Engine = engine
        self.scope: Scope = scope
        self.difference: Difference = difference
        self.relative_step: float | Literal["auto"] = relative_step
        self.every_n_steps, self.warmup_steps = every_n_steps, warmup_steps
        self.check: Check = check
        check_arguments(self)
        self._recorder: StepRecorder | None = None
        self._handles: list[Any] = []

    # Before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the place after Flooding."""
        if stage == "fit":
            put_in_order(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what would train something else."""
        refuse_setup(self, trainer, pl_module)
        reason = None if self.engine == "finite_difference" else why_not_exact(trainer, pl_module)
        if reason and self.engine == "auto":
            rank_zero_warn(f"GradientPenalty(engine='auto') takes finite differences: {reason}.")
        self._exact = self.engine != "finite_difference" and not reason
        self._relative_step: float | None = None if self.relative_step == "auto" else self.relative_step
        self._flooded = any(isinstance(c, Flooding) and c.scope == "step" for c in trainer.callbacks)
        self._checked = self.check == "off"
        self._proven = False  # that the loss can be differentiated twice
        self._latest = Penalised([], torch.zeros(()), 0.0, None)
        self._warned: set[str] = set()
        self._one_gradient = OneGradientPerStep("GradientPenalty")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to remember training steps."""
        if self.match_lr is not None:
            require_sgd(trainer.optimizers[0])
        self._recorder = StepRecorder.attach(trainer, pl_module, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give ``training_step`` back."""
        self._remove_handles()
        if self._recorder is not None:
            self._recorder.detach(self)
            self._recorder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give ``training_step`` back."""
        self.teardown(trainer, pl_module, "fit")

    # When, and how much

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch if its step will be penalised from a replay."""
        self._now = 0.0 if skips_backward(trainer) else self.coefficient_at(trainer)
        sure = self._proven or self.engine == "exact"  # "auto" may yet need the batch
        self._recorder.keep(self, self._now > 0 and not (self._differentiates_at_once(trainer) and sure))

    def coefficient_at(self, trainer: Trainer) -> float:
        """The coefficient of the optimizer step under way; zero for a step without penalty."""
        step = trainer.global_step
        if step % self.every_n_steps:
            return 0.0
        factor = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule is not None:
            factor *= value_at(self.schedule, step)
        return factor * (self._matched(trainer) if self.coefficient is None else self.coefficient)

    def _matched(self, trainer: Trainer) -> float:
        (optimizer,) = trainer.optimizers
        require_sgd(optimizer)  # groups may have been added, or their rates have come apart
        missing = implicit_coefficient(optimizer, self.match_lr) - implicit_coefficient(optimizer)
        if missing < 0:
            self._warn_once(
                f"GradientPenalty(match_lr={self.match_lr}): the learning rate is higher, so that training carries "
                "more implicit regularisation than asked for; the penalty is zero."
            )
        return max(missing, 0.0)

    def _differentiates_at_once(self, trainer: Trainer) -> bool:
        """Whether the penalty is known when a micro-batch's own graph is: no replay is needed then.

        A step's sign of Flooding is known only at its end.
        """
        alone = self.scope == "microbatch" or trainer.accumulate_grad_batches == 1
        return self._exact and alone and not self._flooded

    # One optimizer step, from replays of its micro-batches

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty: the gradient, once a check, its product by a gradient at displaced parameters, the sum."""
        self._one_gradient.check(trainer)
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._recorder.calls and self._now and params and not self._differentiates_at_once(trainer):
            gradient = [param.grad for param in params]
            window = WindowLoss(trainer, pl_module, self._recorder.calls, params)
            if self._relative_step is None:
                found = self._recorder.kinked, self._recorder.half
                self._relative_step = relative_step(trainer, pl_module, self.difference, *found)
            if not self._checked:
                self._check(trainer, pl_module, window, gradient)
            try:
                extra, lengths = self._penalty(trainer, window, gradient)
                self._proven = True
            except RuntimeError as error:
                if not self._exact:
                    raise
                self._give_up_exact(error)
                extra, lengths = self._penalty(trainer, window, gradient)
            if extra is not None and not self._overflowed(trainer, gradient, extra):
                torch._foreach_add_(local(gradient), local(extra))
            self._remember(lengths)
        logs_now = trainer.log_every_n_steps and (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        if logs_now:
            self._log()

    def _penalty(
        self, trainer: Trainer, window: WindowLoss, gradient: list[Tensor]
    ) -> tuple[list[Tensor] | None, list[Tensor]]:
        """The gradient of the penalty (``None`` where there is none), and the length of each gradient it penalises."""
        k = trainer.accumulate_grad_batches
        if self.scope == "step" or k == trainer.world_size == 1:
            # Lightning divides an incomplete window by the full k: its gradient is n / k of the mean's, and so is this
            extra, length = self._penalty_along(window, gradient, self._now, share=len(self._recorder.calls) / k)
            return extra, [length]
        total = [torch.zeros_like(param) for param in window.params]
        lengths = [self._add_micro_batch(part, total, self._now / k) for part in window.micro_batches()]
        mean_over_ranks_(total)
        return total, lengths

    def _penalty_along(
        self, window: WindowLoss, gradient: list[Tensor], coefficient: float, share: float = 1.0
    ) -> tuple[list[Tensor] | None, Tensor]:
        """The gradient's Hessian product, weighted (``None`` if there is no direction), and the gradient's length."""
        length = norm(gradient) / share
        if self._exact:
            product = window.exact_product(gradient)
        else:
            step = step_along(window.params, gradient, self._relative_step)
            if step is None:
                return None, length
            product = window.product(gradient, step, self.difference, gradient)  # runs it at displaced parameters
        weigh_(product, self.norm, coefficient, length, share)
        return product, length

    def _add_micro_batch(self, part: WindowLoss, total: list[Tensor], coefficient: float) -> Tensor:
        """Add one micro-batch's penalty; returns its gradient's length."""
        _, gradient = part.gradient()
        extra, length = self._penalty_along(part, gradient, coefficient)
        if extra is not None:
            torch._foreach_add_(total, extra)
        return length

    def _check(self, trainer: Trainer, pl_module: LightningModule, window: WindowLoss, gradient: list[Tensor]) -> None:
        """Once: a second run must give the same gradient, and half the automatic step should the same product."""
        if not 0 < norm(gradient).item() < math.inf:
            return  # nothing to compare: look in the next step
        check_repeatable(pl_module, gradient, window.gradient()[1], self._relative_step)
        self._checked = True
        if self._exact or self.relative_step != "auto":
            return
        coarse = relative_step(trainer, pl_module, self.difference, kinked=True)
        if self._relative_step < coarse:
            step = step_along(window.params, gradient, self._relative_step)
            whole, half = (
                extent(window.product(gradient, h, self.difference, gradient), gradient) for h in (step, step / 2)
            )
            if not is_resolved(whole, half, self._relative_step, coarse):
                self._relative_step = coarse

    def _overflowed(self, trainer: Trainer, gradient: list[Tensor], extra: list[Tensor]) -> bool:
        """Whether a replay overflowed in fp16: the scaler has looked before, and would not skip the step."""
        if getattr(trainer.precision_plugin, "scaler", None) is None or torch.isfinite(norm(extra)):
            return False
        if torch.isfinite(norm(gradient)):  # else the scaler skips the step
            self._warn_once("GradientPenalty: a replay overflowed in fp16; such a step goes without penalty.")
        return True

    def extra_gradient(self, trainer: Trainer, window: WindowLoss, gradient: list[Tensor]) -> list[Tensor]:
        """The penalty's gradient at the present parameters, for a callback that looks at the objective.

        Args:
            trainer: the running trainer.
            window: the loss of the window under way.
            gradient: its gradient at the present parameters.

        Returns:
            Shaped like the parameters; zeros in a step without penalty.
        """
        extra = self._penalty(trainer, window, gradient)[0] if self._now else None
        return [torch.zeros_like(g) for g in gradient] if extra is None else extra

    # One micro-batch, exactly, within its backward pass

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Exact and at once: differentiate twice within the backward pass, so that DDP averages the sum."""
        if not self._now or not self._differentiates_at_once(trainer):
            return
        try:
            self._differentiate_twice(trainer, pl_module, loss)
            self._proven = True
        except RuntimeError as error:
            self._give_up_exact(error)

    def _give_up_exact(self, error: RuntimeError) -> None:
        if self.engine != "auto" or self._proven:
            raise RuntimeError(f"GradientPenalty(engine={self.engine!r}): {explain(error)}.") from error
        rank_zero_warn(f"GradientPenalty(engine='auto') takes finite differences: {explain(error)}.")
        self._exact = False

    def _differentiate_twice(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        params = [p for group in trainer.optimizers[0].param_groups for p in group["params"] if p.requires_grad]
        first = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        unscale = trainer.accumulate_grad_batches / loss_scale(trainer)  # loss arrives times scale / k
        gradient = [
            torch.zeros_like(param) if g is None else g.detach() * unscale
            for g, param in zip(first, params, strict=True)
        ]
        if self.scope == "step":
            mean_over_ranks_(gradient)
        length = norm(gradient)
        weigh_(gradient, self.norm, self._now, length)
        if self._proven and len(params) == sum(param.requires_grad for param in pl_module.parameters()):
            _add_without_value(loss, first, gradient)
        else:  # one pass more: its errors are ours to explain, and parameters of no optimizer are left alone
            self._add_by_hooks(params, second_derivative(first, params, gradient, retain_graph=True))
        earlier = self._latest.lengths[: len(self._recorder.losses) - 1]  # of the window's other micro-batches
        self._remember([*earlier, length])

    def _add_by_hooks(self, params: list[Tensor], extras: list[Tensor | None]) -> None:
        for param, extra in zip(params, extras, strict=True):
            if extra is not None:
                self._handles.append(param.register_hook(lambda grad, extra=extra: grad + extra))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The hooks have done their work."""
        self._remove_handles()

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # Logging

    def _remember(self, lengths: list[Tensor]) -> None:
        loss = torch.stack(self._recorder.losses).double().mean()
        self._latest = Penalised(lengths, loss, self._now, None if self._exact else self._relative_step)

    def _log(self) -> None:
        """Log this step; one without penalty has a coefficient only."""
        if not self._now or not self._latest.lengths:
            self.log("igr/coefficient", self._now)
            return
        lengths, loss, coefficient, step = self._latest
        lengths = torch.stack(lengths)
        squared, penalised = (lengths**2).mean(), size(self.norm, lengths).mean()
        loss = loss.clone()
        mean_over_ranks_([squared, penalised, loss])
        logs = {
            "igr/coefficient": coefficient,
            "igr/grad_norm_sq": squared,
            "igr/penalty": coefficient * penalised,
            "igr/penalty_ratio": coefficient * penalised / loss.abs(),
        }
        if step is not None:
            logs["igr/relative_step"] = step
        self.log_dict({name: torch.as_tensor(value, dtype=torch.float32) for name, value in logs.items()})

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._warned:
            self._warned.add(sentence)
            rank_zero_warn(sentence)


def _add_without_value(loss: Tensor, first: Sequence[Tensor | None], direction: Sequence[Tensor]) -> None:
    """Add zero to the loss, with the gradient ``d/dtheta <first, direction>``: one backward pass serves both.

    Lightning hands over a loss of its own making, not the module's.
    """
    parts = [(g * v).sum() for g, v in zip(first, direction, strict=True) if g is not None and g.requires_grad]
    if parts:
        total = torch.stack(parts).sum().to(loss.dtype)
        loss.add_(total - total.detach())
