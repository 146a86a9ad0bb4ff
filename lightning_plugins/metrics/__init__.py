"""Metrics that torchmetrics lacks, or gets wrong, right over several ranks."""

from lightning_plugins.metrics.birthday import BirthdayParadox
from lightning_plugins.metrics.extractors import feature_extractor
from lightning_plugins.metrics.frechet import FrechetDistance
from lightning_plugins.metrics.generation_scores import GenerationScores
from lightning_plugins.metrics.kernel import KernelDistance
from lightning_plugins.metrics.precision_recall import PrecisionRecallDensityCoverage

__all__ = [
    "BirthdayParadox",
    "FrechetDistance",
    "GenerationScores",
    "KernelDistance",
    "PrecisionRecallDensityCoverage",
    "feature_extractor",
]
