"""What a penalised step is asked before its gradient is displaced: does running it again give the same one?"""

from collections.abc import Sequence

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_plugins.core.vectors import local, norm


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
