"""Fréchet distance of the features of real and generated images: FID with any extractor, its reference in a file."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_plugins.core import arguments as must
from lightning_plugins.core.new_file import new_file
from lightning_plugins.metrics.extractors import feature_extractor
from lightning_plugins.metrics.features import FeatureMetric


class _Sums(NamedTuple):
    """Of features, of their outer products, and how many."""

    total: Tensor
    outer: Tensor
    count: Tensor


class _Rows(nn.Identity):
    """Features as they come; torchmetrics asks a network for their number."""

    def __init__(self, num_features: int | None) -> None:
        super().__init__()
        self.num_features = num_features


class FrechetDistance(FeatureMetric, FrechetInceptionDistance):
    r"""Fréchet distance of two normal distributions with the mean and covariance of real and generated features.

    .. math:: \|\mu_r - \mu_g\|^2 + \mathrm{tr}\big(\Sigma_r + \Sigma_g - 2 (\Sigma_r \Sigma_g)^{1/2}\big)

    torchmetrics' FID, in double precision, with an extractor that no training touches. Distances of different
    extractors, or of other numbers of images, do not compare: few images make it larger.

    Args:
        feature: what images are compared by: digits (a small classifier in the package), inception (which needs
            torch-fidelity), or a module with the attribute num_features. None takes features (B, F) in place of images.
        num_features: number of features F, where feature is None; give it only then.
        reset_real_features: whether a reset forgets the real images, too, loaded ones included.

    Raises:
        ValueError: ``num_features`` without ``feature=None``, or the reverse; an argument that is none of its values.

    Example:
        >>> corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> distance = FrechetDistance(feature=None, num_features=2)
        >>> distance.update(corners, real=True)
        >>> distance.update(corners + 3, real=False)
        >>> distance.compute()
        tensor(18.)

    Source: Heusel et al. 2017, arXiv 1706.08500, eq. 6.
    """

    def __init__(
        self,
        feature: str | nn.Module | None = "digits",
        num_features: int | None = None,
        reset_real_features: bool = False,
    ) -> None:
        must.optional(must.count)("num_features", num_features)
        must.flag("reset_real_features", reset_real_features)
        if (feature is None) != (num_features is not None):
            told = must.told(feature)
            raise ValueError(f"num_features={num_features} and feature={told}: give one of them, the other None.")
        extractor = None if feature is None else feature_extractor(feature)
        rows = num_features if extractor is None else extractor.num_features
        super().__init__(extractor, feature=_Rows(rows), reset_real_features=reset_real_features)
        self._reference: _Sums | None = None  # not a state: the same on all ranks, so not to be summed

    def compute(self) -> Tensor:
        """The distance, a float32 scalar, 0 or more.

        Raises:
            ValueError: fewer than two real or generated images.
        """
        own, total = self._real_sums(), self._real_sums(self._reference)
        num_features = len(total.total)
        for kind, count in (("real", total.count), ("generated", self.fake_features_num_samples)):
            if count < 2:
                raise ValueError(f"FrechetDistance needs two {kind} images or more, got {count}: call update first.")
            if count <= num_features:
                warnings.warn(
                    f"FrechetDistance of {count} {kind} images in {num_features} features means little, as their "
                    "covariance is singular: give more images or fewer features.",
                    stacklevel=2,
                )
        self._set_real(total)
        self.orig_dtype = torch.float32  # of the answer; else that of the last features, and a rank may have had none
        try:
            return super().compute().clamp_min(0)
        finally:
            self._set_real(own)

    def update(self, images: Tensor, real: bool) -> None:
        """Take more images, or features of the stated number: see :meth:`FeatureMetric.update`."""
        width = len(self.real_features_sum)
        if self.extractor is None and images.ndim == 2 and images.shape[1] != width:
            raise ValueError(f"features have {images.shape[1]} columns and num_features={width}: make them equal.")
        super().update(images, real)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Take the images of another metric, loaded ones included; a reference that both have loaded counts once.

        Args:
            incoming_state: the other metric, or its states by name, which hold no loaded images.

        Raises:
            ValueError: two different references, or features of another extractor.
        """
        theirs = incoming_state._reference if isinstance(incoming_state, FrechetDistance) else None
        own = self._reference
        if theirs is not None and own is not None and not all(map(torch.equal, own, theirs)):
            raise ValueError("merge_state: the metrics have loaded different references: load the same one into both.")
        super().merge_state(incoming_state)
        self._reference = own if theirs is None else theirs

    def reset(self) -> None:
        """Forget the generated images; the real ones, loaded or not, under ``reset_real_features`` alone."""
        super().reset()
        if self.reset_real_features:
            self._reference = None

    def save_reference(self, path: str | Path) -> None:
        """Write the real images' sums, their number and the extractor's fingerprint into a file, all or nothing.

        With several processes all must call it; the first one writes the sums of all.

        Args:
            path: file to write; its folder is made if missing.

        Raises:
            ValueError: no real images yet.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            sums = self._real_sums(self._reference)
        if not sums.count:
            raise ValueError("save_reference needs real images: call update(images, real=True) before.")
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or torch.distributed.get_rank() == 0:
            content = {name: value.cpu() for name, value in sums._asdict().items()}
            _write({**content, "extractor": self.fingerprint()}, Path(path))
        if distributed:
            torch.distributed.barrier()  # the others may load it now

    def load_reference(self, path: str | Path) -> None:
        """Take a file's images as the real ones; those of later updates are added. All processes must call it.

        Args:
            path: file that :meth:`save_reference` wrote.

        Raises:
            ValueError: another file, or its features are of another extractor.
        """
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or set(content) != {*_Sums._fields, "extractor"}:
            raise ValueError(f"{path} holds no reference: give a file that save_reference wrote.")
        theirs, own = content.pop("extractor"), self.fingerprint()
        if theirs != own:
            raise ValueError(
                f"{path} holds features of another extractor, {_words(theirs)}, this metric's is {_words(own)}: "
                "write the reference again with save_reference."
            )
        self._set_real(_Sums(*(torch.zeros_like(value) for value in self._real_sums())))
        self._reference, self._computed = _Sums(**content), None

    def fingerprint(self) -> dict[str, str | int]:
        """What must be equal for a reference to fit: name, number of features and a hash of the weights."""
        return {**super().fingerprint(), "num_features": len(self.real_features_sum)}

    def _real_sums(self, reference: _Sums | None = None) -> _Sums:
        own = _Sums(self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples)
        return own if reference is None else _Sums(*(a + b.to(a.device) for a, b in zip(own, reference, strict=True)))

    def _set_real(self, sums: _Sums) -> None:
        self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples = sums


def _words(fingerprint: dict[str, str | int]) -> str:
    name, weights = fingerprint["name"], str(fingerprint.get("weights", ""))[:8]
    return f"{name} ({fingerprint['num_features']} features{', weights ' + weights if weights else ''})"


def _write(content: dict[str, Any], path: Path) -> None:
    """Write beside the file and rename: a reader sees the whole of it or nothing."""
    with new_file(path) as file:
        torch.save(content, file)
