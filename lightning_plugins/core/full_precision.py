"""Numbers that no precision plugin narrows: metrics in a module of half precision, weights of a double one."""

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_plugins.core.merging import Merging


class FullPrecision(Merging):
    """To stand before a metric whose states are float32 or wider, whatever the module around is cast to.

    Under ``precision="bf16-true"`` Lightning casts a module with all its metrics: a count in bfloat16 ends at 256, as
    257 does not exist, and a mean over an epoch is wrong without a word.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        def widened(value: Tensor) -> Tensor:
            applied = fn(value)
            if not applied.is_floating_point():
                return applied
            return value.to(applied.device, torch.promote_types(applied.dtype, torch.float32))

        return super()._apply(widened, exclude_state)


class FullPrecisionMean(FullPrecision, MeanMetric):
    """torchmetrics' ``MeanMetric`` in float32 or wider; a mean over NaN is NaN, so that a diverged run shows.

    Example:
        >>> mean = FullPrecisionMean().to(torch.bfloat16)
        >>> for _ in range(300):
        ...     mean.update(torch.tensor([3.0, 4.0]))
        >>> mean.compute()
        tensor(3.5000)
        >>> mean.reset()
        >>> mean.update(torch.tensor(1.0), weight=3)
        >>> mean.update(torch.tensor(5.0), weight=1)
        >>> mean.compute()
        tensor(2.)
    """

    def __init__(self) -> None:
        super().__init__("disable")

    def update(self, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Take values, each with its weight: torchmetrics 1.9 forgets weights where it does not look for NaN."""
        value = value.to(self.mean_value)
        weight = torch.as_tensor(weight).to(self.mean_value).expand_as(value)
        # Not in place: a state that validate() has reset in inference mode is read by fit() outside of it.
        self.mean_value = self.mean_value + (value * weight).sum()
        self.weight = self.weight + weight.sum()


def widen(module: LightningModule, trainer: Trainer | None) -> None:
    """Cast a module to the float64 of ``precision="64-true"``; call it before a checkpoint is read.

    Lightning reads the checkpoint first and casts then: float64 weights would pass through float32 and lose half their
    digits in each resume. Half precision passes through float32 unharmed.
    """
    if trainer is not None and trainer.precision == "64-true":
        module.double()
