"""The window of an optimizer step run again: gradients of the trained objective, and sharpness, for ODEDiagnostics."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plugins.callbacks.checked_steps import CheckedSteps
from lightning_plugins.callbacks.ode_diagnostics.optimizer_flow import Flow, Rule, read_flow
from lightning_plugins.callbacks.ode_diagnostics.rows import (
    Step,
    divided,
    flow_rows,
    loss_rows,
    second_order_rows,
    sharpness_rows,
)
from lightning_plugins.callbacks.ode_diagnostics.sharpness import (
    TopEigenpair,
    Vector,
    random_direction,
    top_eigenpair,
)
from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.vectors import local, mean_over_ranks_, norm
from lightning_plugins.replay.differences import best_displacement, step_along
from lightning_plugins.replay.missing_terms import ask
from lightning_plugins.replay.recorder import StepRecorder
from lightning_plugins.replay.twice import explain, why_not_exact
from lightning_plugins.replay.window import WindowLoss

Engine = Literal["auto", "exact", "finite_difference"]
# Relative difference that rounding may make between two gradients of one batch.
_SAME = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@runtime_checkable
class Penalty(Protocol):
    """What is asked of GradientPenalty."""

    def coefficient_at(self, trainer: Trainer) -> float:
        """Its factor in the step under way."""

    def extra_gradient(self, trainer: Trainer, window: WindowLoss, gradient: list[Tensor]) -> list[Tensor]:
        """The penalty's gradient at the present parameters."""


class Probe:
    """Evaluates the objective of the window under way at the present parameters.

    Args:
        trainer: the running trainer.
        module: the trained module, under automatic optimization.
        recorder: the module's recorder, which keeps the window's calls.
        engine: how Hessian products are computed.

    Attributes:
        repeats: whether a second run gives the same gradient, as last seen; ``None`` until that was looked at.
        products: the number of Hessian products of the last search for the sharpness.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, recorder: StepRecorder, engine: Engine) -> None:
        self.repeats: bool | None = None
        self.products = 0
        self._checks = CheckedSteps("steps")
        self._told: set[str] = set()
        self._trainer, self._module, self._recorder = trainer, module, recorder
        self.penalty = next((c for c in trainer.callbacks if isinstance(c, Penalty)), None)
        self._eigenvector: Vector | None = None
        self._asked = False  # in the search under way
        self._engine, self._exact = engine, engine != "finite_difference"

    def losses(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The window's mean loss over all ranks as it was, raw and with the calls' signs; two 0-dim tensors."""
        if not self._recorder.losses:
            return None, None
        raw = torch.stack([loss.double().reshape(()) for loss in self._recorder.losses])
        signed = raw
        if self._is_complete():
            signed = torch.stack([loss * call.sign for loss, call in zip(raw, self._recorder.calls, strict=True)])
        means = raw.mean(), signed.mean()
        mean_over_ranks_(means)
        return means

    def _is_complete(self) -> bool:
        return 0 < len(self._recorder.calls) == len(self._recorder.losses)

    def is_ready(self, params: Sequence[Tensor], step: int) -> bool:
        """Whether the window can be run again with the same result.

        Looked at in the first probe, the second, fourth, eighth and so on, where the step's gradient was taken.
        """
        if self.repeats is False or not self._is_complete():
            return False
        due = self._checks.due()
        grads = [param.grad for param in params]
        length = norm(grads).item()
        if due and 0 < length < math.inf:
            again: Vector = []
            with self._surviving("running the window again"):
                _, again = self._gradient(self._window(params))
            if not again:
                return False  # what failed is tried again in the next probe
            torch._foreach_sub_(local(again), local(grads))
            self._judge(norm(again).item() / length, self._tolerance(grads), step)
        return bool(self.repeats)

    def _judge(self, error: float, tolerance: float, step: int) -> None:
        self.repeats = error <= tolerance
        if self.repeats:
            self._checks.passed(step - 1)
            return
        right = ", ".join(map(str, self._checks.right))
        before = f" in step {step}; it was the same in {right}" if right else ""
        rank_zero_warn(
            "ODEDiagnostics: running training_step again on the same batch gives another gradient (relative "
            f"difference {error:.1e}){before}: it keeps a state that a replay does not restore (an iterator, a file, a "
            "variable of a function), or a hook changes gradients. Rows that need a second run are omitted from now on."
        )

    @contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Let no error of a second run end the training: each kind is said once."""
        try:
            yield
        except Exception as error:
            failed = f"{what} failed with {type(error).__name__}"
            self._tell_once(
                failed, f": {failed}: {error} Rows that need it are omitted where it does; training goes on as without."
            )

    def _tell_once(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            rank_zero_warn(f"ODEDiagnostics{text}")

    def _tolerance(self, grads: Sequence[Tensor]) -> float:
        dtypes = {grad.dtype for grad in grads}
        if str(self._trainer.precision) not in ("32-true", "64-true"):
            dtypes.add(torch.bfloat16)
        return max(_SAME[dtype] for dtype in dtypes)

    def rows(
        self,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        params: Sequence[Tensor],
        step: Step,
        before: Tensor,
        tol: float | None,
        search: tuple[float, int] | None,
    ) -> dict[str, float]:
        """All rows that need a second gradient, without those that fail; call it right after the step.

        Args:
            optimizer: the optimizer that made the step.
            rule: its rule.
            params: the parameters that had a gradient.
            step: the step that it made.
            before: the signed mean loss before the step, a 0-dim tensor.
            tol: relative local error that ``lr_for_tol`` allows; ``None`` leaves that row out.
            search: relative accuracy and most products of a search for the sharpness; ``None`` for no search.
        """
        rows: dict[str, float] = {}
        window, flow = self._window(params), None
        with self._surviving("running the window again"):
            loss, change = self._gradient(window)
            torch._foreach_sub_(local(change), local(step.gradient))
            rows |= second_order_rows(step, change)
            if not self._is_penalised():
                mean_over_ranks_([loss])
                share = len(self._recorder.calls) / self._trainer.accumulate_grad_batches
                rows |= loss_rows(step, share * (loss - before).item())
            flow = read_flow(optimizer, rule, params)
            if flow.h > 0:
                rows |= flow_rows(step, change, flow, rule, tol)
            del change
        if search is not None and flow is not None and flow.h > 0:
            with self._surviving("the search for the sharpness"):
                pair = self._top_eigenpair(window, flow, rule, *search)
                rows |= sharpness_rows(pair.value, flow, rule, rows.get("edge_ratio_step"))
        return rows

    def _window(self, params: Sequence[Tensor]) -> WindowLoss:
        return WindowLoss(self._trainer, self._module, self._recorder.calls, params)

    def _is_penalised(self) -> bool:
        return self.penalty is not None and self.penalty.coefficient_at(self._trainer) > 0

    def _gradient(self, window: WindowLoss) -> tuple[Tensor, Vector]:
        """Signed loss of this rank, and the gradient of the objective that is trained."""
        loss, gradient = window.gradient()
        if self._is_penalised():
            extra = self.penalty.extra_gradient(self._trainer, window, gradient)
            torch._foreach_add_(local(gradient), local(extra))
        return loss, gradient

    def _top_eigenpair(
        self, window: WindowLoss, flow: Flow, rule: Rule, rtol: float, max_products: int
    ) -> TopEigenpair:
        """Of ``h P^-1/2 (H + w) P^-1/2``, from the last time's eigenvector on."""
        if self._exact and (reason := why_not_exact(self._trainer, self._module)):
            self._give_up_exact(RuntimeError(reason), reason)
        self._asked = False
        roots = [rate**0.5 for rate in flow.rates]

        def product(vector: Vector) -> Vector:
            direction = [root * part for root, part in zip(roots, vector, strict=True)]
            terms = zip(roots, self._curved(window, direction), flow.decays, direction, strict=True)
            return [root * (rule.sign * part + decay * moved) for root, part, decay, moved in terms]

        start = self._eigenvector
        if start is None or [part.shape for part in start] != [param.shape for param in window.params]:
            start = divided(random_direction(window.params), roots)  # isotropic in the parameters
        pair = top_eigenpair(product, start, rtol, max_products)
        self.products = pair.products
        self._eigenvector = pair.vector if math.isfinite(pair.value) else None
        return pair

    def _curved(self, window: WindowLoss, direction: Vector) -> Vector:
        """The Hessian times a direction."""
        if self._exact:
            try:
                product = window.exact_product(direction)
                self._ask(window, direction)
                return product
            except RuntimeError as error:
                self._give_up_exact(error, explain(error))
        found = self._recorder.kinked, self._recorder.half
        step = step_along(window.params, direction, best_displacement(self._trainer, self._module, "central", *found))
        if step is None:
            return [torch.zeros_like(v) for v in direction]
        return window.product(direction, step.size, "central")

    def _ask(self, window: WindowLoss, direction: Vector) -> None:
        """Once for a search: whether custom functions of the graph let themselves be differentiated twice."""
        if self._asked:
            return
        self._asked = True
        if not largest_over_ranks(len(window.functions), self._trainer.strategy.root_device):
            return
        kinked, half = bool(self._recorder.kinked), self._recorder.half
        gradient = window.gradient()[1]
        found = ask(self._trainer, self._module, window, window.functions, gradient, kinked, half, direction)
        if found:
            self._tell_once(found, f", the sharpness: {found}.")

    def _give_up_exact(self, error: RuntimeError, reason: str) -> None:
        if self._engine == "exact":
            reason = reason.replace("engine='finite", "sharpness_engine='finite")
            raise RuntimeError(f"sharpness_engine='exact' is not possible: {reason}.") from error
        self._exact = False
        reason = reason.split(";")[0]
        rank_zero_warn(
            f"ODEDiagnostics takes finite differences for the sharpness: {reason}. Where activations have kinks (ReLU) "
            "they see more than the Hessian."
        )
