"""EAE: an autoencoder with batch-normalised codes of maximal entropy generates images from N(0, I).

Read in this order: ``entropy.py`` (the estimate that is maximised, from its first function down), ``objectives.py``
(the terms that it is one of), ``batch_norm.py`` (codes among which N(0, I) has the largest entropy), ``module.py`` (a
batch from ``training_step`` to ``loss`` and its terms). ``nearest_neighbours.py`` holds the estimate's search.
"""

from lightning_plugins.eae.batch_norm import LatentBatchNorm
from lightning_plugins.eae.diagnostics import LatentDiagnostics, latent_diagnostics
from lightning_plugins.eae.entropy import (
    KNNEntropyLoss,
    conditional_knn_entropy,
    count_duplicates,
    entropy_gap,
    gaussian_reference_entropy,
    knn_entropy,
    koleo_loss,
)
from lightning_plugins.eae.gaussianity import mmd, sigreg
from lightning_plugins.eae.kept_codes import KNNEntropy
from lightning_plugins.eae.module import EAE
from lightning_plugins.eae.paths import interpolate_codes
from lightning_plugins.eae.priors import LatentPrior

__all__ = [
    "EAE",
    "KNNEntropy",
    "KNNEntropyLoss",
    "LatentBatchNorm",
    "LatentDiagnostics",
    "LatentPrior",
    "conditional_knn_entropy",
    "count_duplicates",
    "entropy_gap",
    "gaussian_reference_entropy",
    "interpolate_codes",
    "knn_entropy",
    "koleo_loss",
    "latent_diagnostics",
    "mmd",
    "sigreg",
]
