"""What an evaluation collects: loss, scores of generated texts, and samples to look at."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.full_precision import FullPrecisionMean
from lightning_plugins.metrics.generation_scores import GenerationScores

COLUMNS = ("source", "reference", "generated")
_SHOWN = 16  # samples kept for the table


def widened(logits: Tensor) -> Tensor:
    """In at least fp32, where probabilities are summed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Evaluation(nn.Module):
    """One pass over validation or test data, on every rank.

    Args:
        lowercase: compare texts without capitals, for a tokenizer that loses them.
    """

    def __init__(self, lowercase: bool) -> None:
        super().__init__()
        self.nll, self.scores = FullPrecisionMean(), GenerationScores(lowercase=lowercase)
        self.samples: list[tuple[str, str, str]] = []
        self._share: set[int] = set()

    def add_nll(self, logits: Tensor, labels: Tensor) -> None:
        """Negative log-likelihood of ``labels`` ``(N,)`` under ``logits`` ``(N, V)``; every token weighs the same."""
        if len(labels):
            self.nll.update(F.cross_entropy(widened(logits), labels), weight=len(labels))

    def add_texts(
        self, sources: Sequence[str], references: Sequence[str], predictions: Sequence[str], written: Sequence[str]
    ) -> None:
        """Score predictions against ``written``, the references in the tokenizer's spelling; keep the first samples."""
        self.scores.update(list(predictions), list(written))
        rows = zip(sources, references, predictions, strict=True)
        self.samples += list(rows)[: max(0, _SHOWN - len(self.samples))]

    def in_share(self, batch_idx: int, rows: int, wanted: int, batches: int | float, device: torch.device) -> bool:
        """Whether a batch is among those that together hold ``wanted`` samples; every rank must ask for each.

        They are evenly spaced, because batches may be sorted by length.

        Args:
            batch_idx: number of this batch; the choice is made at 0.
            rows: samples in it, on this rank.
            wanted: samples to be chosen over all ranks.
            batches: number of batches in the pass, which may be infinite.
            device: where tensors live that the ranks exchange.
        """
        if batch_idx == 0:
            ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            count = int(min(math.ceil(wanted / (ranks * largest_over_ranks(rows, device))), batches))
            spacing = 1 if math.isinf(batches) else batches / count
            self._share = {int((i + 0.5) * spacing) for i in range(count)}
        return batch_idx in self._share

    def results(self, device: torch.device) -> dict[str, Tensor]:
        """``loss``, ``perplexity`` and, where texts were generated on any rank, their scores; collective."""
        nll = self.nll.compute()
        scores = self.scores.compute() if largest_over_ranks(len(self.samples), device) else {}
        return {"loss": nll, "perplexity": nll.exp(), **scores}

    def reset(self) -> None:
        """Begin a new pass."""
        self.nll.reset()
        self.scores.reset()
        self.samples = []
