"""How far a run displaces its parameters: what was measured best, until its own steps show rounding, kinks or bends."""

import math
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_plugins.core.vectors import norm
from lightning_plugins.replay.differences import LONGEST, Difference, Displacement, Step, best_displacement, step_along
from lightning_plugins.replay.recorder import StepRecorder
from lightning_plugins.replay.window import WindowLoss

_UNRESOLVED = 0.25  # change of the product by half the step: a forward difference is then wrong by about half
_ROUGH = 0.75  # the same where kinks are averaged: most of the product is then chance


class ChosenDisplacement:
    """The displacement of finite differences, chosen once and lengthened where a checked step asks for it.

    Args:
        difference: ``"auto"`` leaves it to precision and kinks.
        relative_step: ``"auto"`` leaves it to them too; a number is taken as it is.
    """

    def __init__(self, difference: Difference | Literal["auto"], relative_step: float | Literal["auto"]) -> None:
        self._now: Displacement | None = None
        self._difference: Difference | Literal["auto"] = difference
        self._relative_step: float | Literal["auto"] = relative_step
        self._coarse: Displacement | None = None  # over which kinks are averaged
        self._averages = False  # whether that one is taken
        self._rough = False  # told that even that one does not resolve the loss

    @property
    def now(self) -> Displacement:
        """The present one."""
        assert self._now is not None, "choose first"
        return self._now

    def choose(self, trainer: Trainer, module: LightningModule, recorder: StepRecorder) -> None:
        """Once: by what is known before any measurement, the precision, and kinks by the names of operations."""
        if self._now is None:
            difference, kinked, half = self._difference, recorder.kinked, recorder.half
            self._now = best_displacement(trainer, module, difference, kinked, half)
            self._coarse = best_displacement(trainer, module, difference, True, half)
            self._averages = self._now == self._coarse
            if self._relative_step != "auto":
                self._now = Displacement(self._now.difference, self._relative_step)

    def look(self, window: WindowLoss, gradient: list[Tensor]) -> None:
        """Lengthen the displacement while its difference is rounding; take the coarse one where half of it disagrees.

        Args:
            window: the loss of a step.
            gradient: its gradient, neither zero nor infinite.
        """
        if self._relative_step != "auto":
            return
        length, step = self._above_rounding(window, gradient)
        change = norm(window.product_change(gradient, step.size, self.now.difference, gradient)).item()
        if length == 0 or not math.isfinite(change / length):  # no curvature, or an overflow of fp16
            return
        change /= length
        if not self._averages:
            if change > _UNRESOLVED:
                self._take_coarse(change, step)
        elif change > _ROUGH and not self._rough:
            self._rough = True
            rank_zero_warn(
                f"GradientPenalty: finite differences do not resolve this loss's curvature: half the displacement of "
                f"{step.length:.1g} changes the Hessian product by {change:.0%}. The penalty is that of the loss "
                "smoothed over it. For the loss's own use engine='exact', or a relative_step of your own."
            )

    def _above_rounding(self, window: WindowLoss, gradient: list[Tensor]) -> tuple[float, Step]:
        """A step over which the gradient changes by more than rounding, if there is one, and the product's norm."""
        theta, floor = norm(window.params).item(), self.now.least_change * norm(gradient).item()
        while True:
            step = step_along(window.params, gradient, self.now)
            assert step is not None, "neither zero nor infinite"
            length = norm(window.product(gradient, step.size, self.now.difference, gradient)).item()
            change = length * (step.size if self.now.difference == "forward" else 2 * step.size)
            rounded = change < floor and step.length < LONGEST
            if rounded or (theta == 0 and not self.now.shortest):  # a norm that will grow from zero says nothing
                factor = min(10.0, max(2.0, floor / change if change else math.inf)) if rounded else 1.0
                longer = min(factor * step.length, LONGEST)
                self._now = self.now._replace(shortest=longer, longest=max(longer, self.now.longest))
            if not rounded:
                return length, step

    def _take_coarse(self, change: float, step: Step) -> None:
        assert self._coarse is not None, "choose first"
        rank_zero_warn(
            f"GradientPenalty: the automatic relative_step={step.relative:.1g} does not resolve this loss's curvature: "
            f"half of it changes the Hessian product by {change:.0%}. It may have kinks: {self._coarse.relative:g}, at "
            f"most a length of {self._coarse.longest:g}, is taken, over which they are averaged. Else use "
            "engine='exact' or a smaller relative_step of your own."
        )
        self._now = self._coarse._replace(shortest=self.now.shortest)
        self._averages = self._rough = True  # which was told

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, as plain data."""
        chosen = {"_now": self._now, "_coarse": self._coarse}
        flags = {"_averages": self._averages, "_rough": self._rough}
        return flags | {name: value and list(value) for name, value in chosen.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was."""
        self._averages, self._rough = state["_averages"], state["_rough"]
        self._now, self._coarse = (state[name] and Displacement(*state[name]) for name in ("_now", "_coarse"))
