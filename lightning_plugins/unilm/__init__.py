"""UniLM: a masked BERT becomes a sequence-to-sequence model by its attention mask alone."""

from lightning_plugins.unilm.module import UniLMSeq2Seq
from lightning_plugins.unilm.plots import plot_masks

__all__ = ["UniLMSeq2Seq", "plot_masks"]
