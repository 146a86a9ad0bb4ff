"""Which of the steps that are run again are checked, and which were right: for GradientPenalty and ODEDiagnostics."""

import copy
import math
from typing import Any, Literal

Check = Literal["steps", "first_step", "off"]

_STATE = ("_penalised", "_next", "_right", "_strongest")
_JUMP = 10  # times the strongest penalty so far: noise divided by a displacement, or a loss that has changed


class CheckedSteps:
    """The first, second, fourth, eighth... step of those that are run again, and such as are far stronger than others.

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

    @property
    def right(self) -> list[int]:
        """The numbers of those that were checked and right."""
        return list(self._right)

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
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a run was."""
        for name in _STATE:
            setattr(self, name, copy.copy(state[name]))
