"""Metrics that torchmetrics lacks, or gets wrong, right over several ranks.

Those of images compare features of real and generated ones; ``GenerationScores`` compares texts.

Read in this order: ``features.py`` (images become rows of features, by a network that nothing trains),
``precision_recall.py`` (the shortest metric of them), ``birthday.py`` and ``near_duplicates.py`` (the longest).
"""

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
