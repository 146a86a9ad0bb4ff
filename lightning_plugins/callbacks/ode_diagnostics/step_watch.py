"""When one optimizer steps, as the hooks of Lightning and torch tell: the half of ODEDiagnostics that counts."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_plugins.callbacks.ode_diagnostics.optimizer_flow import (
    FlowTime,
    Rule,
    calls_hooks,
    rule_of,
    why_unreadable,
)
from lightning_plugins.core.lightning_internals import batches_that_stepped
from lightning_plugins.core.optimizers import parameters_of


class StepWatch:
    """Follows the steps of one optimizer, also those that a GradScaler skips.

    Args:
        trainer: the running trainer.
        optimizer: the optimizer to follow.
        ended: called after each step that :meth:`begin` saw, with whether the optimizer has moved the parameters.
        warn: called with a sentence to say once.

    Attributes:
        optimizer: the optimizer that is followed.
        steps: the number of steps seen so far, skipped ones included.
        skipped: the number of steps that the GradScaler has skipped.
        time: the flow time of the steps taken.
    """

    def __init__(
        self, trainer: Trainer, optimizer: Optimizer, ended: Callable[[bool], None], warn: Callable[[str], None]
    ) -> None:
        self.optimizer, self.time = optimizer, FlowTime(optimizer)
        self.steps, self.skipped = batches_that_stepped(trainer), 0
        self._trainer, self._ended, self._warn = trainer, ended, warn
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._begun_at: int | None = None
        self._under_way = self._announced = False
        self._depth = 0
        self._handles: list[Any] = []
        if calls_hooks(optimizer):
            self._handles = [
                optimizer.register_step_pre_hook(self._enter),
                optimizer.register_step_post_hook(self._leave),
            ]

    def batch_begins(self) -> None:
        """A step that was broken off by an error is over."""
        self._depth = 0

    def begin(self, optimizer: Optimizer) -> Sequence[Tensor]:
        """An optimizer has its gradients; of several evaluations in one step (LBFGS) only the first counts.

        Returns:
            The parameters that have a gradient; none if this is no step to look at.
        """
        if optimizer is not self.optimizer:
            return []
        self._announced = True
        if self._begun_at == self._trainer.global_step:
            return []
        self.end_without_hook()
        params = [p for p in parameters_of(optimizer) if p.grad is not None]
        if params and (why := why_unreadable(optimizer, self._scaler is not None, params)):
            self._warn(f"nothing is logged: {why}.")
            return []
        if params:
            self.steps += 1
            self._begun_at, self._under_way = self._trainer.global_step, True
        return params

    def end_without_hook(self) -> None:
        """A step under way is over, though no hook said so: one that was skipped, or an optimizer that calls none."""
        if self._under_way:
            self._end(moved=self._scaler is None)

    def _enter(self, *_: Any) -> None:
        self._depth += 1  # a subclass's step that calls its parent's has the hooks called for both

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        if self._under_way:
            self._end(moved=True)
        elif not self._announced:
            self._warn(
                "an optimizer steps past Lightning, so that nothing is logged of it: take it from self.optimizers() "
                "without use_pl_optimizer=False, and call its step()."
            )
        self._announced = False

    def _end(self, moved: bool) -> None:
        self._under_way = False
        if not moved:
            self.skipped += 1
        elif isinstance(rule := rule_of(self.optimizer), Rule):
            self.time.advance(self.optimizer, rule)
        self._ended(moved)

    def detach(self) -> None:
        """Leave the optimizer as it was found."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Flow time, and the counts of steps and of skipped ones."""
        return {"flow": self.time.state_dict(), "steps": self.steps, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.time.load_state_dict(state["flow"])
        self.steps, self.skipped = state["steps"], state["skipped"]
