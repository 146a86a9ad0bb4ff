"""Counting tokens: equal weights over ranks and accumulated batches, and speed."""

import time

import torch
import torch.distributed
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_plugins.core.distributed import sum_over_ranks
from lightning_plugins.replay.recorder import is_replaying


class TokenWeights:
    r"""Factors that turn means over micro-batches into one mean over all tokens of an optimiser step.

    Lightning averages the losses of :math:`k` accumulated batches, and DDP and FSDP average the gradients of
    :math:`R` ranks: a batch with few tokens would weigh as much as one with many. With :math:`n_{ir}` tokens in batch
    i of rank r and :math:`N_i = \sum_r n_{ir}`, batch i is weighted by :math:`R\, n_{ir} / N_1`, known when it is
    computed, and the summed gradient before the step by :math:`k N_1 / \sum_i N_i`. Without accumulation the second
    factor is one.
    """

    def __init__(self) -> None:
        self._unit: float | None = None  # N_1 of the window under way
        self._total = 0.0

    def reset(self, unit: float | None = None, total: float = 0.0) -> None:
        """Begin a new window, or go on with the one that :attr:`window` described."""
        self._unit, self._total = unit, total

    @property
    def window(self) -> tuple[float | None, float]:
        """Of the window under way, N_1 (``None`` before its first batch) and the tokens until now, for a checkpoint."""
        return self._unit, self._total

    def weight(self, tokens: int, device: torch.device) -> float:
        """The factor of a batch with ``tokens`` predicted tokens on this rank; every rank must ask."""
        ranks, everywhere = 1, float(tokens)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
            count = torch.tensor(everywhere, device=device)
            torch.distributed.all_reduce(count)
            everywhere = count.item()
        unit = everywhere if self._unit is None else self._unit
        if not is_replaying():
            self._unit, self._total = unit, self._total + everywhere
        return ranks * tokens / max(unit, 1.0)

    def scale_gradients(self, module: LightningModule, batches: int) -> None:
        """Apply the second factor; call it once before an optimiser step, after accumulation.

        Args:
            module: whose gradients have been accumulated and averaged over ranks.
            batches: k, by which Lightning divides the losses.
        """
        if self._unit is not None and batches > 1 and self._total:
            factor = batches * self._unit / self._total
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        self.reset()


def refuse_blind_callbacks(trainer: Trainer) -> None:
    """Refuse Flooding, GradientPenalty and ODEDiagnostics under accumulation.

    They see the losses and gradients of a window before it is known how many tokens it has. A callback to which their
    size does not matter says so by ``any_scale``.

    Raises:
        MisconfigurationException: one of them is among the callbacks, and batches are accumulated.
    """
    readers = [c for c in trainer.callbacks if hasattr(c, "gradient_order") and not getattr(c, "any_scale", False)]
    names = [type(callback).__name__ for callback in readers]
    if names and trainer.accumulate_grad_batches > 1:
        raise MisconfigurationException(
            f"{' and '.join(names)} cannot see how UniLMSeq2Seq weighs accumulated batches by their tokens: set "
            f"accumulate_grad_batches=1, got {trainer.accumulate_grad_batches}, or take the callback out."
        )


class TokenSpeed:
    """Real tokens per second since the last asking; it waits for the device only when asked."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count anew from now on."""
        self._tokens: Tensor | int = 0
        self._since = time.perf_counter()

    def add(self, segment_ids: Tensor) -> None:
        """Count a batch's tokens; padding does not count, nor does a replay of the batch."""
        if not is_replaying():
            self._tokens = self._tokens + (segment_ids > 0).sum()

    def per_second(self, device: torch.device) -> float:
        """Tokens of all processes, each of which must ask, per second of this one; starts anew."""
        tokens = int(sum_over_ranks(torch.as_tensor(self._tokens, device=device)))
        seconds = time.perf_counter() - self._since
        self.start()
        return tokens / max(seconds, 1e-9)
