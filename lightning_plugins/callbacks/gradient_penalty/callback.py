"""Implicit gradient regularisation made explicit: a penalty on the norm of the loss's gradient, for any module."""

import math
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.callbacks.checked_steps import Check, CheckedSteps
from lightning_plugins.callbacks.flooding.callback import Flooding
from lightning_plugins.callbacks.gradient_penalty.displacement import ChosenDisplacement
from lightning_plugins.callbacks.gradient_penalty.exact import ExactPenalty, Look, add_by_hooks
from lightning_plugins.callbacks.gradient_penalty.repeatable import check_repeatable
from lightning_plugins.callbacks.gradient_penalty.rules import CURE, Engine, Scope, check_arguments, refuse_setup
from lightning_plugins.callbacks.gradient_penalty.term import PenaltyNorm, descend_, size, weigh_
from lightning_plugins.callbacks.implicit_regularization import implicit_coefficient, require_sgd
from lightning_plugins.callbacks.piecewise import Points, value_at
from lightning_plugins.callbacks.run_checks import (
    NeedsTrainer,
    OneGradientPerStep,
    put_in_order,
    require_automatic_optimization,
)
from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.lightning_internals import is_scaled, loss_scale, skips_backward
from lightning_plugins.core.optimizers import maximized, parameters_of
from lightning_plugins.core.vectors import foreach_add_, local, mean_over_ranks_, norm
from lightning_plugins.replay.differences import Difference, step_along
from lightning_plugins.replay.missing_terms import ask, told
from lightning_plugins.replay.recorder import StepRecorder
from lightning_plugins.replay.twice import Arrivals, MissedTermError, explain, why_not_exact
from lightning_plugins.replay.window import WindowLoss


class Penalised(NamedTuple):
    """What is logged of a penalised step.

    Attributes:
        lengths: of the gradients that were penalised on this rank, 0-dim tensors.
        loss: mean over this rank's micro-batches.
        coefficient: ``c``.
        relative_step: displacement over the parameters' norm; ``None`` for exact products, or without a direction.
    """

    lengths: list[Tensor]
    loss: Tensor
    coefficient: float
    relative_step: float | None


class GradientPenalty(NeedsTrainer):
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
    accumulation or several ranks; four to seven more in a checked step); exact 4 to 5, and two to three times the
    memory. Finite differences keep two copies of the trained parameters (four with ``scope="microbatch"`` and more than
    one), and for each micro-batch copies of its batch and of the module's state (buffers, and networks that are not
    trained unless they are far larger than what is). Lightning's finders of learning rate and batch size take all
    callbacks away while they search. A teacher whose outputs are detached is moved with the student where both share
    weights: finite differences see that, autograd does not.

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
            parameters; it works with fused attention, compiled modules and FSDP2. "exact" differentiates twice, and
            fails before a weight changes where that would miss a part of the loss: it compares the gradient that the
            graph shows with that of the backward pass (reentrant checkpoints and reversible layers hide some), and for
            custom functions its product with finite differences (a backward of detached values lacks a term), in the
            first penalised step and the second, fourth, eighth and so on. A custom function whose backward is not the
            derivative of its forward, such as a straight-through estimator, is taken as that backward says, with one
            warning, and so is one that no difference could judge. "auto" is exact where that is possible, and takes
            finite differences with one warning where it is not.
        scope: whose gradient is penalised: "step" takes that of the whole effective batch, "microbatch" that of each
            micro-batch on each rank.
        difference: which finite difference is taken: the error of "forward" is of first order in the displacement,
            that of "central" of second, for one more pass. "auto" is central where the loss has kinks or is computed
            in half precision, else forward.
        relative_step: the displacement divided by the norm of the parameters, between 0 and 1. "auto" takes the best
            measured for the precision of the forward pass, and no more than a length: fp32 1e-4 up to .003 forward,
            1e-3 up to .005 central; bf16 up to .03; fp16 and TF32 up to .01 and .02. Where the loss has kinks (ReLU,
            max-pooling, rounding) it takes 3e-2 up to .05 central, up to .1 forward, since a unit that crosses its kink
            within a tiny step adds a jump divided by that step, which destroys training. Kinks are known by the names
            of operations, or found in checked steps by halving the displacement; where a difference is mere rounding
            (weights that start from zero) it is lengthened. Across kinks the penalty is that of the loss smoothed over
            the displacement, and differs from the exact one, which does not see kinks. A loss that bends within such
            steps (attention logits in the hundreds) needs a smaller step or engine="exact".
        every_n_steps: the penalty is added in every n-th optimizer step only; 1 or more. The coefficient is not
            scaled: on average over steps the objective has c / n.
        warmup_steps: number of optimizer steps over which the coefficient grows linearly from zero; 0 or more.
        schedule: pairs [step, factor] for the coefficient, with growing optimizer steps and factors of 0 or more;
            linear between the steps, constant before the first and after the last. None is a factor of 1.
        check: which penalised steps are checked. "steps" takes the first, second, fourth, eighth and so on, and any
            whose penalty is ten times stronger than before; "first_step" the first alone; "off" none. A checked step
            is run again at the unmoved parameters and raises if that gives another gradient, as a training_step does
            that cannot be repeated; then half the automatic displacement should give the same Hessian product, and if
            not a warning tells what is done.

    Raises:
        ValueError: an argument out of range.
        MisconfigurationException: before training, for a setup in which the penalty would not be this one.

    Parameters that their optimizer moves up the gradient (``maximize=True``) move down the penalty all the same. A
    checkpoint holds what was found in checked steps, so that a resumed run equals one that was never stopped.

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
        difference: Difference | Literal["auto"] = "auto",
        relative_step: float | Literal["auto"] = "auto",
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        schedule: Points | None = None,
        check: Check = "steps",
    ) -> None:
        self.coefficient, self.match_lr, self.schedule = coefficient, match_lr, schedule
        self.norm: PenaltyNorm = norm
        self.engine: Engine = engine
        self.scope: Scope = scope
        self.difference: Difference | Literal["auto"] = difference
        self.relative_step: float | Literal["auto"] = relative_step
        self.every_n_steps, self.warmup_steps = every_n_steps, warmup_steps
        self.check: Check = check
        check_arguments(self)
        self._recorder: StepRecorder | None = None
        self._handles: list[Any] = []
        self._unseen: Arrivals | None = None
        self._look: Look | None = None
        self._precision: str | None = None
        self._resumed: dict[str, Any] = {}
        self._begin(exact=False)

    def _begin(self, exact: bool) -> None:
        """What is found out during a run, at its beginning."""
        self._exact = exact
        self._proven = False  # that the loss can be differentiated twice
        self._penalised = 0  # steps so far
        self._checks = CheckedSteps(self.check)
        self._displacement = ChosenDisplacement(self.difference, self.relative_step)
        self._relative_step: float | None = None  # the latest

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
        self._precision = str(trainer.precision)
        self._begin(exact=self.engine != "finite_difference" and not reason)
        self._resume()
        self._flooded = any(isinstance(c, Flooding) and c.scope == "step" for c in trainer.callbacks)
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
        if self._look is not None:
            self._look.close()
            self._look = None
        if self._recorder is not None:
            self._recorder.detach(self)
            self._recorder = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give ``training_step`` back."""
        self.teardown(trainer, pl_module, "fit")

    # What a checkpoint holds

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """What was found out during the run, and the arguments under which it was.

        Where Lightning puts the states of callbacks; a ``state_dict`` would make it refuse a second penalty before
        ``refuse_setup`` can say why.
        """
        found = {"exact": self._exact, "proven": self._proven, "penalised": self._penalised}
        found |= {"checks": self._checks.state_dict()}
        found |= {"arguments": self._arguments(), "displacement": self._displacement.state_dict()}
        checkpoint["callbacks"][self.state_key] = found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember it until the run begins."""
        self._resumed = state_dict

    def _arguments(self) -> list[Any]:
        return [self.engine, self.scope, self.difference, self.relative_step, self.check, self._precision]

    def _resume(self) -> None:
        """Go on where the run was; after a change of arguments everything is found out anew."""
        state, self._resumed = self._resumed, {}
        if state.get("arguments") == self._arguments():
            self._exact, self._proven = self._exact and state["exact"], state["proven"]
            self._penalised = state["penalised"]
            self._checks.load_state_dict(state["checks"])
            self._displacement.load_state_dict(state["displacement"])

    # When, and how much

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch if its step will be penalised from a replay."""
        require_automatic_optimization("GradientPenalty", pl_module, CURE)  # it may have changed
        self._now = 0.0 if skips_backward(trainer) else self.coefficient_at(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0:  # also if the last window was broken off
            self._look = None
        at_once = self._differentiates_at_once(trainer)
        # a step that is looked at may yet need the batch: "auto" to fall back, a custom function to be compared
        spare = self._is_looked_at() and (self.engine == "auto" or self.check != "off")
        self._recorder.keep(self, self._now > 0 and (not at_once or spare))

    def _is_looked_at(self) -> bool:
        """Whether this step's exact penalty is compared: the first, second, fourth, eighth..."""
        return not self._proven or (self.check == "steps" and self._penalised & (self._penalised + 1) == 0)

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
        """Add the penalty: the gradient, now and then a check, its product by displaced gradients, the sum."""
        self._one_gradient.check(trainer)
        params = [param for param in parameters_of(optimizer) if param.grad is not None]
        if self._now and params:
            if self._look is not None:
                self._add_what_waited(trainer, pl_module, params, self._look)
            if self._recorder.calls and not self._differentiates_at_once(trainer):
                self._add_from_replays(trainer, pl_module, params)
            self._penalised += 1
        logs_now = trainer.log_every_n_steps and (trainer.global_step + 1) % trainer.log_every_n_steps == 0
        if logs_now:
            self._log()

    def _add_from_replays(self, trainer: Trainer, pl_module: LightningModule, params: list[Tensor]) -> None:
        gradient = [grad for param in params if (grad := param.grad) is not None]
        window = WindowLoss(trainer, pl_module, self._recorder.calls, params)
        self._displacement.choose(trainer, pl_module, self._recorder)
        if self._checks.due():
            self._check(trainer, pl_module, window, gradient)
        try:
            extra, lengths = self._penalty(trainer, window, gradient)
            if self._exact and self._is_looked_at():
                self._ask(trainer, pl_module, window, gradient, window.functions)
            self._proven = True
        except RuntimeError as error:
            if not self._exact:
                raise
            self._give_up_exact(error)
            if self.check != "off":
                self._check(trainer, pl_module, window, gradient)
            extra, lengths = self._penalty(trainer, window, gradient)
        if self._jumps(extra, lengths):
            self._check(trainer, pl_module, window, gradient)
            extra, lengths = self._penalty(trainer, window, gradient)
        if extra is not None and not self._overflowed(trainer, gradient, extra):
            foreach_add_(local(gradient), local(extra))
        self._remember(lengths)

    def _penalty(
        self, trainer: Trainer, window: WindowLoss, gradient: list[Tensor]
    ) -> tuple[list[Tensor] | None, list[Tensor]]:
        """The gradient of the penalty (``None`` where there is none), and the length of each gradient it penalises."""
        k = trainer.accumulate_grad_batches
        if self.scope == "step" or k == trainer.world_size == 1:
            # Lightning divides an incomplete window by the full k: its gradient is n / k of the mean's, and so is this
            extra, length = self._penalty_along(window, gradient, self._now, share=len(self._recorder.calls) / k)
            lengths = [length]
        else:
            extra = [torch.zeros_like(param) for param in window.params]
            lengths = [self._add_micro_batch(part, extra, self._now / k) for part in window.micro_batches()]
            mean_over_ranks_(extra)
        if extra is not None:
            descend_(extra, window.params, maximized(*trainer.optimizers))
        return extra, lengths

    def _penalty_along(
        self, window: WindowLoss, gradient: list[Tensor], coefficient: float, share: float = 1.0
    ) -> tuple[list[Tensor] | None, Tensor]:
        """The gradient's Hessian product, weighted (``None`` if there is no direction), and the gradient's length."""
        length = norm(gradient) / share
        if self._exact:
            product = window.exact_product(gradient, gradient, trusted=self.check == "off")
        else:
            step = step_along(window.params, gradient, displacement := self._displacement.now)
            if step is None:
                return None, length
            self._relative_step = step.relative
            product = window.product(gradient, step.size, displacement.difference, gradient)  # displaced
        weigh_(product, self.norm, coefficient, length, share)
        return product, length

    def _add_micro_batch(self, part: WindowLoss, total: list[Tensor], coefficient: float) -> Tensor:
        """Add one micro-batch's penalty; returns its gradient's length."""
        _, gradient = part.gradient()
        extra, length = self._penalty_along(part, gradient, coefficient)
        if extra is not None:
            foreach_add_(total, extra)
        return length

    def _check(self, trainer: Trainer, pl_module: LightningModule, window: WindowLoss, gradient: list[Tensor]) -> None:
        """A second run must give the same gradient, and half the automatic displacement should the same product."""
        if not 0 < norm(gradient).item() < math.inf:
            return  # nothing to compare: look in the next step
        again = window.gradient()[1]
        if self._overflowed(trainer, gradient, again):
            return
        when = self._checks.history(trainer.global_step)
        check_repeatable(pl_module, gradient, again, self._displacement.now.relative, when)
        del again  # a copy of the parameters
        self._checks.passed(trainer.global_step)
        if not self._exact:
            self._displacement.look(window, gradient)

    def _jumps(self, extra: list[Tensor] | None, lengths: list[Tensor]) -> bool:
        """Whether the penalty is far stronger than in any step before, for gradients of these lengths."""
        if extra is None or self.check != "steps":
            return False
        scale = torch.stack(lengths).mean() if self.norm == "squared" else 1.0
        strength = (norm(extra) / (self._now * scale)).item()
        jumps = self._checks.jumps(strength)
        self._checks.saw(strength)
        return jumps

    def _overflowed(self, trainer: Trainer, gradient: list[Tensor], extra: list[Tensor]) -> bool:
        """Whether a replay overflowed in fp16: the scaler has looked before, and would not skip the step."""
        if not is_scaled(trainer) or torch.isfinite(norm(extra)):
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
        except RuntimeError as error:
            self._give_up_exact(error)

    def _give_up_exact(self, error: RuntimeError) -> None:
        if self.engine != "auto" or not self._recorder.calls:
            raise RuntimeError(f"GradientPenalty(engine={self.engine!r}): {explain(error)}.") from error
        rank_zero_warn(f"GradientPenalty(engine='auto') takes finite differences: {explain(error)}.")
        self._exact, self._look = False, None

    def _differentiate_twice(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        params = [param for param in parameters_of(trainer.optimizers[0]) if param.requires_grad]
        scale = loss_scale(trainer) / trainer.accumulate_grad_batches
        penalty = ExactPenalty(loss, params, scale, self._now, self.norm, joined=self.scope == "step")
        if self._is_looked_at():  # one pass more: its errors are ours to explain
            self._look = self._look or Look(pl_module, compares=self.check != "off")
            self._look.listen(penalty)
        else:
            climbing = maximized(*trainer.optimizers)
            if not climbing and len(params) == sum(param.requires_grad for param in pl_module.parameters()):
                penalty.add_to_loss()
            else:  # parameters of no optimizer are left alone
                descend_(extras := penalty.extras(), params, climbing)
                self._handles = add_by_hooks(params, extras)
            if any(g is None for g in penalty.first):
                self._unseen = Arrivals(penalty.first, params, pl_module, all_of_them=False)
        earlier = self._latest.lengths[: len(self._recorder.losses) - 1]  # of the window's other micro-batches
        self._remember([*earlier, penalty.length])

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The hooks have done their work: has the backward pass brought what the graph shows?"""
        unseen = self._unseen
        self._remove_handles()
        try:
            if unseen is not None:
                unseen.check()
            if self._look is not None:
                self._add_if_seen(trainer, self._look)
        except MissedTermError as error:
            self._give_up_exact(error)

    def _add_if_seen(self, trainer: Trainer, look: Look) -> None:
        """After the backward pass of a step that was looked at: add the penalty, unless it has to wait.

        It waits for other micro-batches, and for finite differences that are asked about custom functions. Else it is
        there, as in other steps, when the module's own ``on_after_backward`` comes.
        """
        params = [param for param in parameters_of(trainer.optimizers[0]) if param.grad is not None]
        gradient = [grad for param in params if (grad := param.grad) is not None]
        if look.check() and is_scaled(trainer):  # the scaler is yet to look, and skips the step
            for grad in gradient:
                grad.fill_(math.inf)
        elif trainer.accumulate_grad_batches == 1 and not largest_over_ranks(
            len(look.functions), trainer.strategy.root_device
        ):
            self._look = None
            self._add_seen(trainer, params, gradient, look, 1.0)

    def _add_what_waited(self, trainer: Trainer, pl_module: LightningModule, params: list[Tensor], look: Look) -> None:
        """The penalties of a step that was looked at; none if finite differences are to be taken after all."""
        self._look = None
        gradient = [param.grad for param in params if param.grad is not None]
        window = WindowLoss(trainer, pl_module, self._recorder.calls, params)
        try:
            self._ask(trainer, pl_module, window, gradient, look.functions)
        except RuntimeError as error:
            self._give_up_exact(error)
            return
        self._add_seen(trainer, params, gradient, look, loss_scale(trainer))

    def _add_seen(
        self,
        trainer: Trainer,
        params: list[Tensor],
        gradient: list[Tensor],
        look: Look,
        scale: Tensor | float,
    ) -> None:
        """Add the penalties of backward passes that brought what their graphs show, divided by a scale."""
        self._proven = True
        descend_(extra := look.extras(params, scale), params, maximized(*trainer.optimizers))
        if not self._overflowed(trainer, gradient, extra):
            foreach_add_(gradient, extra)

    def _ask(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        window: WindowLoss,
        gradient: list[Tensor],
        functions: set[str],
    ) -> None:
        """Ask finite differences about custom functions in the graph; raises, or warns of what stays open."""
        if not largest_over_ranks(len(functions), trainer.strategy.root_device):
            return
        recorder = self._recorder
        if self.check == "off":
            found = told(functions, "unknown", "check='off'")
        else:
            found = ask(trainer, pl_module, window, functions, gradient, bool(recorder.kinked), recorder.half)
        if found:
            self._warn_once(f"GradientPenalty(engine={self.engine!r}): {found}.")

    def _remove_handles(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._unseen is not None:
            self._unseen.close()
        self._handles, self._unseen = [], None

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
