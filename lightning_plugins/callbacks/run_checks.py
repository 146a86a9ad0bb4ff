"""What our callbacks ask of a run: each rule is one sentence that is raised before training.

The rules name what would otherwise train something else without a word.
"""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
DEVICES = ("cpu", "cuda")


class NeedsTrainer(Callback):
    """To stand in the place of ``Callback``: refuses Fabric, which takes any callback and calls none of a trainer's."""

    def on_after_setup(self, fabric: Any, module: Any) -> None:
        """Called by ``Fabric.setup``, and by no Trainer.

        Raises:
            MisconfigurationException: always.
        """
        name = type(self).__name__
        raise MisconfigurationException(
            f"{name} would do nothing under Fabric, which calls none of a Trainer's hooks: train by a Trainer, with "
            f"Trainer(callbacks=[{name}(...)])."
        )


def require_automatic_optimization(name: str, pl_module: LightningModule, cure: str) -> None:
    """Refuse manual optimization: the callback sees neither which loss nor which step is meant."""
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} works with automatic optimization, but {type(pl_module).__name__} has "
            f"automatic_optimization=False: {cure}."
        )


def require_strategy(name: str, trainer: Trainer) -> None:
    """Refuse strategies whose gradients are not those in ``param.grad`` (DeepSpeed), and what no test runs."""
    if type(trainer.strategy) not in STRATEGIES:
        raise MisconfigurationException(
            f"{name} does not know how gradients are kept under {type(trainer.strategy).__name__}: use a single "
            "device, strategy='ddp' or ModelParallelStrategy (FSDP2)."
        )
    if (device := trainer.strategy.root_device.type) not in DEVICES:
        raise MisconfigurationException(
            f"{name} sums in double precision and sets random states, which it can on {' and '.join(DEVICES)}, not on "
            f"{device!r}: use accelerator='cpu' or 'cuda'."
        )


def require_plain_optimizers(name: str, trainer: Trainer) -> None:
    """Refuse optimizers that evaluate the closure several times, or that step within the backward pass."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise MisconfigurationException(
                f"{name} needs one gradient for each optimizer step, and LBFGS evaluates several: use an optimizer "
                "such as SGD or AdamW."
            )
        if any(p._post_accumulate_grad_hooks for group in optimizer.param_groups for p in group["params"]):
            raise MisconfigurationException(
                f"{name} changes gradients before the optimizer step, but parameters have hooks that run as soon as a "
                "gradient is there (an optimizer in the backward pass): remove them."
            )


def require_descent(name: str, trainer: Trainer, cure: str) -> None:
    """Refuse optimizers that climb, in one of their groups or all; call it when checkpoints have been read."""
    for optimizer in trainer.optimizers:
        if any(group.get("maximize", False) for group in optimizer.param_groups):
            raise MisconfigurationException(
                f"{name} works on a loss that is minimised, but {type(optimizer).__name__} has maximize=True: leave it "
                f"out, and {cure}."
            )


def put_in_order(trainer: Trainer) -> None:
    """Let Flooding, GradientPenalty, NonFiniteGuard and ODEDiagnostics run in this order, whatever order the user gave.

    Other callbacks keep their places. A class says its place by ``gradient_order``, an integer.
    """
    places = [index for index, callback in enumerate(trainer.callbacks) if hasattr(callback, "gradient_order")]
    ours = sorted((trainer.callbacks[index] for index in places), key=lambda callback: callback.gradient_order)
    callbacks = list(trainer.callbacks)
    for index, callback in zip(places, ours, strict=True):
        callbacks[index] = callback
    trainer.callbacks = callbacks  # a new list: Lightning is going through the old one


class OneGradientPerStep:
    """Notices an optimizer that evaluates its closure several times in a step (SAM and its kin).

    Args:
        name: the callback's name, for the sentence.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._last: int | None = None

    def check(self, trainer: Trainer) -> None:
        """Call it in ``on_before_optimizer_step``.

        Raises:
            MisconfigurationException: it was called before in this step.
        """
        if self._last == trainer.global_step:
            raise MisconfigurationException(
                f"{self._name} needs one gradient for each optimizer step, and this optimizer evaluates several "
                "(as SAM does): use a plain one."
            )
        self._last = trainer.global_step
