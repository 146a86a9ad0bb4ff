"""Metrics that torchmetrics lacks, or gets wrong, right over several ranks."""

from lightning_plugins.metrics.extractors import feature_extractor
from lightning_plugins.metrics.frechet import FrechetDistance
from lightning_plugins.metrics.generation_scores import GenerationScores

__all__ = ["FrechetDistance", "GenerationScores", "feature_extractor"]
