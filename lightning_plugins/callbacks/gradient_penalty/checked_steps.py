"""Which penalised steps are checked, and what is asked of them: does running them again give the same gradient?"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_plugins.core.vectors import local, norm

Check = Literal["steps", "first_step", "off"]

_JUMP = 10  # times the strongest penalty so far: noise divided by a displacement, or a loss that has changed


class CheckedSteps:
    """The first, second, fourth, eighth... penalised step, and those whose penalty is far stronger than any before.

    Args:
        check: which of them: ``"steps"`` all, ``"first_step"`` the first one, ``"off"`` none.
        unit: what a step is called in a sentence.
    """

    def __init__(self, check: Check, unit: str = "step") -> None:
        self._unit = unit
        self._repeats, self._penalised = check == "steps", 0
        self._next: float = math.inf if check == "off" else 1
        self._right: list[int] = []
        self._strongest: float | None = None

    def due(self) -> bool:
        """Whether this penalised step is to be checked; call it once in each."""
        self._penalised += 1
        return self._penalised >= self._next

    def passed(self, step: int | None = None) -> None:
        """This one was right: an optimizer step counted from zero, by default the number of penalised ones."""
        number = self._penalised if step is None else step + 1
        if self._right[-1:] != [number]:
            self._right.append(number)
        while self._next <= self._penalised:
            self._next = 2 * self._next if self._repeats else math.inf

    def jumps(self, strength: float) -> bool:
        """Whether a penalty is so strong that its step should be checked.

        Args:
            strength: of the penalty's gradient, over what it is proportional to; NaN or infinite where that overflowed.
        """
        return self._repeats and self._strongest is not None and _JUMP * self._strongest < strength < math.inf

    def saw(self, strength: float) -> None:
        """Remember the strength of a step without suspicion."""
        if math.isfinite(strength):
            self._strongest = max(strength, self._strongest or 0.0)

    def history(self, step: int | None = None) -> str:
        """This one and those that were right, for a sentence."""
        now = f"in {self._unit} {self._penalised if step is None else step + 1}"
        if not self._right:
            return now
        *many, last = map(str, self._right)
        several = f"{self._unit}s {', '.join(many)} and {last} were" if many else f"{self._unit} {last} was"
        return f"{now}; {several} checked and right"

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        names = ("_penalised", "_next", "_right", "_strongest")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was."""
        vars(self).update(state)
        self._right = list(self._right)


def check_repeatable(
    module: LightningModule,
    gradient: Sequence[Tensor],
    again: Sequence[Tensor],
    relative_step: float,
    when: str,
    name: str = "GradientPenalty",
    what: str = "training_step",
    cure: str = "use engine='exact' with scope='microbatch', which runs nothing twice, or check='off' if the "
    "difference is meant",
) -> None:
    """Raise if running a step again at the unmoved parameters has given another gradient.

    Args:
        module: the module that is trained.
        gradient: its gradient as it was at first, neither zero nor infinite.
        again: the second run's gradient, which is overwritten.
        relative_step: the displacement in whose finite difference the error would show.
        when: in which step, and which were right.
        name: the name of the callback or function that asks.
        what: the name of what was run again.
        cure: what to do besides mending it.

    Raises:
        RuntimeError: with what may be the cause.
    """
    torch._foreach_sub_(local(again), local(gradient))
    error = (norm(again) / norm(gradient)).item()
    if not error <= min(1e-2, relative_step):  # a larger one would show in the finite difference
        raise RuntimeError(
            f"{name}: running {what} of {type(module).__name__} again on the same batch gives another gradient "
            f"(relative difference {error:.1e}, {when}). It may keep a state that nobody else sees (in an iterator, a "
            "file, a variable of a function); or a hook changes gradients after the backward pass. Mend that, or "
            f"{cure}."
        )
