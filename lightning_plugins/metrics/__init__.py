"""Metrics that torchmetrics lacks, or gets wrong, right over several ranks."""

from lightning_plugins.metrics.generation_scores import GenerationScores

__all__ = ["GenerationScores"]
