"""Implicit gradient regularisation made explicit: a penalty on the norm of the loss's gradient, for any module."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.callbacks.flooding.callback import Flooding
from lightning_plugins.callbacks.gradient_penalty.first_step import check_repeatable, unresolved
from lightning_plugins.callbacks.gradient_penalty.rules import check_arguments, refuse_setup
from lightning_plugins.callbacks.gradient_penalty.term import Penalty, PenaltyNorm, PenaltyTerm, scale
from lightning_plugins.callbacks.implicit_regularization import implicit_coefficient, require_sgd
from lightning_plugins.callbacks.piecewise import Points, value_at
from lightning_plugins.callbacks.run_checks import OneGradientPerStep, put_in_order, skips_backward
from lightning_plugins.core.lightning_internals import loss_scale
from lightning_plugins.core.vectors import local, mean_over_ranks_, norm
from lightning_plugins.replay.differences import Difference, relative_step
from lightning_plugins.replay.recorder import StepRecorder
from lightning_plugins.replay.twice import explain, second_derivative, why_not_exact
from lightning_plugins.replay.window import WindowLoss

Engine = Literal["finite_difference", "exact", "auto"]
Scope = Literal["step", "microbatch"]


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
    of the trained parameters (four with ``scope="microbatch"`` and more than one), and for each micro-batch its batch,
    the module's buffers and its frozen parameters (these up to 64 MB). Lightning's finders of learning rate and batch
    size take all callbacks away while they search.

    Logs (every ``log_every_n_steps``): ``igr/coefficient``, ``igr/grad_norm_sq``, ``igr/penalty`` (``c`` times the
    norm), ``igr/penalty_ratio`` (penalty / loss), ``igr/relative_step``.

    Args:
        coefficient: ``c >= 0``, in units of 1/curvature (squared) or loss per gradient (norm). 0 trains bit for bit as
            without the callback. Give this or ``match_lr``.
        match_lr: ``h_ref``, a learning rate: the coefficient is what makes training at the present, scheduled rate
            carry the implicit regularisation of ``h_ref``; for ``torch.optim.SGD``, with or without momentum. Zero,
            with a warning, while the present rate is higher.
        norm: ``"squared"``: ``c |grad L|^2``, or ``"norm"``: ``c |grad L|`` (Zhao et al. 2022), which is SAM at
            ``c = rho = relative_step * |theta|`` (forward differences).
        engine: ``"finite_difference"`` runs the window's training steps again at displaced parameters; works with fused
            attention, compiled modules and FSDP2. ``"exact"`` differentiates twice. ``"auto"`` is exact where that is
            possible, with one warning where it is not. A custom function whose backward builds no graph counts as
            constant there.
        scope: ``"step"`` penalises the gradient of the whole effective batch, ``"microbatch"`` that of each micro-batch
            on each rank.
        difference: ``"forward"`` (error of first order in the displacement) or ``"central"`` (second, one more pass).
        relative_step: displacement over the norm of the parameters. ``"auto"`` takes the best measured for the
            precision of the forward pass: fp32 1e-4 forward, 1e-3 central; bf16 3e-2 and 1e-1; fp16 and TF32 1e-2
            and 3e-2. Where the loss has kinks (ReLU, max-pooling) at least 3e-2 and 1e-2: a unit that crosses its kink
            within a tiny step adds a jump divided by that step, which destroys training. The penalty then is that of
            the loss smoothed over the step, and differs from ``"exact"``, which does not see kinks.
            A loss that bends within such steps (attention logits in the hundreds) needs a smaller one or ``"exact"``.
        every_n_steps: add the penalty in every n-th optimizer step only. The coefficient is not scaled: on average over
            steps the objective has ``c / n``.
        warmup_steps: optimizer steps over which the coefficient grows linearly from zero.
        schedule: ``[[step, factor], ...]`` for the coefficient, linear between the steps.
        check: ``"first_step"`` runs the first penalised step again at the unmoved parameters and compares gradients, so
            that a ``training_step`` that cannot be repeated raises; and looks whether half the automatic step gives the
            same Hessian product: if not, it warns and takes the step for kinks. ``"off"`` does neither.

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
        check: Literal["first_step", "off"] = "first_step",
    ) -> None:
        self.coefficient, self.match_lr, self.norm, self.engine = coefficient, match_lr, norm, engine
        self.scope, self.difference, self.relative_step = scope, difference, relative_step
        self.every_n_steps, self.warmup_steps, self.schedule, self.check = every_n_steps, warmup_steps, schedule, check
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
        self._relative_step = None if self.relative_step == "auto" else self.relative_step
        self._flooded = any(isinstance(c, Flooding) and c.scope == "step" for c in trainer.callbacks)
        self._checked = self.check == "off"
        self._proven = False  # that the loss can be differentiated twice
        self._latest: tuple[list[PenaltyTerm], Tensor, float] = ([], torch.zeros(()), 0.0)
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

    # During training

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
        scale(gradient, self._penalty().weight(self._now, length))
        if self._proven and len(params) == sum(param.requires_grad for param in pl_module.parameters()):
            _add_without_value(loss, first, gradient)
        else:  # one pass more: its errors are ours to explain, and parameters of no optimizer are left alone
            self._add_by_hooks(params, second_derivative(first, params, gradient, retain_graph=True))
        earlier, *_ = self._latest  # of the window's other micro-batches
        self._remember([*earlier[: len(self._recorder.losses) - 1], self._penalty().term(None, length)])

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

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Add the penalty of the window to the gradients, from replays."""
        self._one_gradient.check(trainer)
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self._recorder.calls and self._now and params and not self._differentiates_at_once(trainer):
            self._choose_step(trainer, pl_module)
            window = WindowLoss(trainer, pl_module, self._recorder.calls, params)
            gradient = [param.grad for param in params]
            if not self._checked:
                self._check(trainer, pl_module, window, gradient)
            try:
                term = self._term(trainer, window, gradient)
                self._proven = True
            except RuntimeError as error:
                if not self._exact:
                    raise
                self._give_up_exact(error)
                term = self._term(trainer, window, gradient)
            self._add(trainer, gradient, term)
            self._remember([replace(term, gradient=None)])
        logs_now = trainer.log_every_n_steps and (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        if logs_now:
            self._log()

    def extra_gradient(self, trainer: Trainer, window: WindowLoss, gradient: list[Tensor]) -> list[Tensor]:
        """The penalty's gradient at the present parameters, for a callback that looks at the objective.

        Args:
            trainer: the running trainer.
            window: the loss of the window under way.
            gradient: its gradient at the present parameters.

        Returns:
            Shaped like the parameters; zeros in a step without penalty.
        """
        found = self._term(trainer, window, gradient).gradient if self._now else None
        return [torch.zeros_like(g) for g in gradient] if found is None else found

    def _term(self, trainer: Trainer, window: WindowLoss, gradient: list[Tensor]) -> PenaltyTerm:
        accumulate = trainer.accumulate_grad_batches
        if self.scope == "microbatch" and (accumulate > 1 or trainer.world_size > 1):
            return self._penalty().of_micro_batches(window, self._now, accumulate)
        return self._penalty().of_window(window, gradient, self._now, len(self._recorder.calls) / accumulate)

    def _penalty(self) -> Penalty:
        return Penalty(self.norm, self._exact, self.difference, self._relative_step)

    def _add(self, trainer: Trainer, gradient: list[Tensor], term: PenaltyTerm) -> None:
        extra = term.gradient
        if extra is None:
            return
        # the scaler has looked for overflows before: what overflows in a replay would not skip the step
        if getattr(trainer.precision_plugin, "scaler", None) is not None and not torch.isfinite(norm(extra)):
            if torch.isfinite(norm(gradient)):  # else the scaler skips the step
                self._warn_once("GradientPenalty: a replay overflowed in fp16; such a step goes without penalty.")
            return
        torch._foreach_add_(local(gradient), local(extra))

    def _choose_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._relative_step is None:
            found = self._recorder.kinked, self._recorder.half
            self._relative_step = relative_step(trainer, pl_module, self.difference, *found)

    def _check(self, trainer: Trainer, pl_module: LightningModule, window: WindowLoss, gradient: list[Tensor]) -> None:
        self._checked = check_repeatable(pl_module, window, gradient, self._relative_step)
        if not self._checked or self._exact or self.relative_step != "auto":
            return
        coarse = relative_step(trainer, pl_module, self.difference, kinked=True)
        if self._relative_step < coarse and unresolved(window, gradient, self._relative_step, self.difference, coarse):
            self._relative_step = coarse

    # Logging

    def _remember(self, terms: list[PenaltyTerm]) -> None:
        loss = torch.stack(self._recorder.losses).double().mean()
        self._latest = (terms, loss, self._now)

    def _log(self) -> None:
        """Log this step; one without penalty has a coefficient only."""
        if not self._now or not self._latest[0]:
            self.log("igr/coefficient", self._now)
            return
        terms, loss, coefficient = self._latest
        squared = torch.stack([term.squared_norm for term in terms]).mean()
        size = torch.stack([term.size for term in terms]).mean()
        loss = loss.clone()
        mean_over_ranks_([squared, size, loss])
        logs = {
            "igr/coefficient": coefficient,
            "igr/grad_norm_sq": squared,
            "igr/penalty": coefficient * size,
            "igr/penalty_ratio": coefficient * size / loss.abs(),
        }
        if (step := terms[-1].step) is not None:
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
