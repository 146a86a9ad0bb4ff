"""A generative module judged on a cadence: distances, coverage and support size of what it samples, and pictures."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_plugins.callbacks.generative_evaluation.reference_images import (
    gather_chosen,
    reference_images,
    share,
)
from lightning_plugins.callbacks.run_checks import NeedsTrainer
from lightning_plugins.core import arguments as must
from lightning_plugins.core.logging import log_image, log_table
from lightning_plugins.core.pictures import image_grid
from lightning_plugins.core.random_state import get_random_state, set_random_state
from lightning_plugins.core.sampling import draw_samples, takes_generator
from lightning_plugins.metrics.birthday import BirthdayParadox
from lightning_plugins.metrics.extractors import FeatureExtractor, check_feature, feature_extractor
from lightning_plugins.metrics.frechet import FrechetDistance
from lightning_plugins.metrics.kernel import KernelDistance
from lightning_plugins.metrics.precision_recall import PrecisionRecallDensityCoverage

MetricName = Literal["frechet", "kernel", "precision_recall", "birthday"]
_LOGGED = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "support_size")
_ROWS, _PAIRS = 8, 12  # of the pictures


@runtime_checkable
class GenerativeModule(Protocol):
    """What :class:`GenerativeEvaluation` asks of a module."""

    def sample(self, num_samples: int, **options: Any) -> Tensor:
        """Draw ``(num_samples, C, H, W)`` images in [0, 1]; at random by ``generator``, if it takes such an option."""
        ...


class GenerativeEvaluation(NeedsTrainer):
    """Compare what a module samples with real images: figures to log and to select checkpoints by, and pictures.

    In validation, on the cadence, and whenever ``trainer.validate`` or ``trainer.test`` runs, each process draws its
    share of ``num_samples`` images by the module's ``sample(n)``. Logged, as ``val/...`` or ``test/...``:

    - ``frechet_distance`` (:class:`FrechetDistance`), ``kernel_distance`` (:class:`KernelDistance`), ``precision``,
      ``recall``, ``density``, ``coverage`` (:class:`PrecisionRecallDensityCoverage`) and ``support_size``
      (:class:`BirthdayParadox`), of all processes' samples;
    - the pictures ``generated`` and, with ``"birthday"``, ``closest_pairs``: the samples most alike, one above the
      other;
    - a table ``generative`` of these figures and of the intervals of the support size.

    The same random numbers are used every time, so that figures of two epochs differ by the weights alone; they
    depend on the number of processes. A ``sample`` that takes ``generator=`` is given one, for any other the global
    random numbers are set around the call. Training is left as it was: the random states of Python, NumPy and torch are
    put back, and the extractor is no part of the module. Nothing happens in the sanity check, and a resumed run goes
    on without a state. Under ``fast_dev_run`` two samples are drawn and nothing is measured. A figure that too few
    images do not give, as ``birthday`` of less than 101 real ones, is left out with a warning.

    Beside ``every_n_epochs=n``, give ``ModelCheckpoint(monitor="val/frechet_distance", every_n_epochs=n)`` the same
    cadence, since Lightning keeps the last figure in between; and ``EarlyStopping(..., strict=False)`` n times the
    patience, since it counts validations and there is no figure before the first evaluation.

    Args:
        every_n_epochs: epochs from one evaluation in training to the next, 1 or more; 1 by default, which is each
            validation.
        num_samples: images drawn by all processes together, 2 or more. Distances of different numbers do not compare;
            the default of 5,000 holds some 1,250 near-duplicates if the samples are as diverse as the data.
        metrics: names of the figures to compute, some of frechet, kernel, precision_recall and birthday; by default all
            four.
        feature: network by whose features images are compared. The default of digits is a small classifier of digits in
            this package, inception is the InceptionV3 of torchmetrics, and a module with the attribute num_features is
            taken, too.
        reference: real images to compare with: val (the default), train or test takes those of that split, read once
            in a run; any other word is a file that FrechetDistance.save_reference has written, which serves frechet
            alone.
        batch_size: images drawn at a time by one process, 1 or more; the default is 256, and less needs less memory.
        seed: start of the random numbers that the samples are drawn with, 0 or more; each process has numbers of its
            own. The default is 0.
        sample_options: further arguments of the module's method sample, by name, such as a prior; none by default.

    Raises:
        ValueError: a wrong argument.
        MisconfigurationException: the module has no such ``sample``, or the run no such loader.

    Example:
        >>> evaluation = GenerativeEvaluation(every_n_epochs=5, num_samples=2_000, metrics=["frechet", "birthday"])
    """

    def __init__(
        self,
        every_n_epochs: int = 1,
        num_samples: int = 5_000,
        metrics: Sequence[MetricName] = ("frechet", "kernel", "precision_recall", "birthday"),
        feature: str | nn.Module = "digits",
        reference: str = "val",
        batch_size: int = 256,
        seed: int = 0,
        sample_options: dict[str, Any] | None = None,
    ) -> None:
        must.check(
            locals(),
            every_n_epochs=must.count,
            num_samples=must.whole(2),
            metrics=must.each(must.one_of(MetricName), of="a list of metrics"),
            reference=must.path,
            batch_size=must.count,
            seed=must.seed,
            sample_options=must.optional(must.mapping),
        )
        check_feature(feature)
        self._from_file = reference not in ("train", "val", "test")
        if self._from_file and list(metrics) != ["frechet"]:
            raise ValueError(
                f"reference={reference!r} is taken for a file, which serves frechet alone, but metrics={list(metrics)}:"
                ' use reference="train", "val" or "test", or metrics=["frechet"].'
            )
        if self._from_file and not Path(reference).is_file():
            raise ValueError(f'reference={reference!r} must be "train", "val", "test" or a file, and there is no such.')
        self.every_n_epochs, self.num_samples = every_n_epochs, num_samples
        self.batch_size, self.seed = batch_size, seed
        self.metrics, self.feature, self.reference = tuple(metrics), feature, reference
        self.sample_options = dict(sample_options or {})
        self._extractor: FeatureExtractor | None = None
        self._judges: dict[str, Metric] = {}
        self._has_real_images = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the module before anything runs."""
        if stage == "predict":
            return
        _require_sample(pl_module, self.sample_options)
        if self.num_samples < trainer.world_size:
            raise ValueError(
                f"num_samples={self.num_samples} must be at least one for each of {trainer.world_size} processes."
            )
        device = trainer.strategy.root_device
        state = get_random_state(device)  # a new network draws its first weights
        self._extractor = feature_extractor(self.feature)
        set_random_state(state, device)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the real images; the next run may have others."""
        self._extractor, self._judges, self._has_real_images = None, {}, False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, on the cadence."""
        fits = trainer.state.fn == TrainerFn.FITTING
        if trainer.sanity_checking or (fits and (trainer.current_epoch + 1) % self.every_n_epochs):
            return
        self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate."""
        self._evaluate(trainer, pl_module, "test")

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        device = trainer.strategy.root_device
        state = get_random_state(device)  # loaders and other people's sample() may draw global random numbers
        if trainer.fast_dev_run:
            self._draw_few(trainer, pl_module, device, state)
            return
        try:
            if not self._has_real_images:
                self._judges, self._has_real_images = self._with_real_images(trainer, device), True
            images = self._draw(trainer, pl_module, device)
            figures = self._compute()
            self._show(trainer, images, stage, device)
        finally:
            set_random_state(state, device)
        for metric in self._judges.values():
            metric.reset()
        logged = {f"{stage}/{name}": figures[name] for name in _LOGGED if name in figures}
        pl_module.log_dict(logged, sync_dist=True)  # equal on all ranks; Lightning asks for the mean
        rows = [["num_samples", self.num_samples], *([name, f"{v.item():.6g}"] for name, v in figures.items())]
        log_table(trainer, f"{stage}/generative", ["figure", "value"], rows, trainer.global_step)

    def _compute(self) -> dict[str, Tensor]:
        """All figures; one that cannot be had of so few images is left out from here on, and told."""
        figures = {}
        for name, metric in list(self._judges.items()):
            try:
                figures |= _figures(metric)
            except ValueError as error:  # on all processes alike: it is of all their images
                rank_zero_warn(f"GenerativeEvaluation leaves out metrics={name!r}: {error}")
                del self._judges[name]
        return figures

    def _draw_few(
        self, trainer: Trainer, pl_module: LightningModule, device: torch.device, state: dict[str, Any]
    ) -> None:
        """Two samples through the extractor show that all fits; figures of so few would only warn."""
        try:
            with trainer.precision_plugin.val_step_context():
                generator = torch.Generator(device).manual_seed(0)
                images = draw_samples(pl_module.sample, 2, generator, **self.sample_options)
            self._extractor.to(device)(images)
        finally:
            set_random_state(state, device)

    def _with_real_images(self, trainer: Trainer, device: torch.device) -> dict[str, Metric]:
        self._extractor.to(device)
        if self._from_file:
            frechet = FrechetDistance(self._extractor).to(device)
            frechet.load_reference(self.reference)
            return {"frechet": frechet}
        make = {
            "frechet": lambda: FrechetDistance(None, num_features=self._extractor.num_features),
            "kernel": lambda: KernelDistance(None),
            "precision_recall": lambda: PrecisionRecallDensityCoverage(None),
            "birthday": lambda: BirthdayParadox(None),
        }
        judges = {name: make[name]().to(device) for name in self.metrics}
        torch.manual_seed(self.seed)  # one order of a shuffled loader on all processes, or their shares would overlap
        for images in reference_images(trainer, self.reference):
            if len(images):
                self._update(judges, images.to(device), real=True)
        return judges

    def _draw(self, trainer: Trainer, pl_module: LightningModule, device: torch.device) -> Tensor:
        """Sample this process's share and show it to the metrics; ``(n, C, H, W)`` bytes on the CPU."""
        rank, world_size = trainer.global_rank, trainer.world_size
        generator = torch.Generator(device).manual_seed(self.seed * world_size + rank)
        wanted, most = (share(self.num_samples, r, world_size)[0] for r in (rank, 0))
        kept = []
        for start in range(0, most, self.batch_size):  # the same calls on all ranks, as the module may be sharded
            num = min(self.batch_size, most - start)
            with trainer.precision_plugin.val_step_context():
                images = draw_samples(pl_module.sample, num, generator, **self.sample_options)
            if not isinstance(images, Tensor) or images.ndim != 4 or len(images) != num:
                found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
                raise MisconfigurationException(
                    f"{type(pl_module).__name__}.sample({num}) must return {num} images (n, C, H, W), got {found}."
                )
            images = images[: wanted - start].to(device)
            if len(images):
                self._update(self._judges, images, real=False)
                kept.append((images.float() * 255).round().byte().cpu())
        return torch.cat(kept)

    def _update(self, judges: Mapping[str, Metric], images: Tensor, real: bool) -> None:
        given = images if self._from_file else self._extractor(images)
        for metric in judges.values():
            metric.update(given, real=real)

    def _show(self, trainer: Trainer, images: Tensor, stage: str, device: torch.device) -> None:
        step, zoom = trainer.global_step, max(1, 32 // images.shape[-1])
        first = image_grid(images[: _ROWS**2].float() / 255, _ROWS, zoom=zoom)
        log_image(trainer, f"{stage}/generated", first, step)
        if (birthday := self._judges.get("birthday")) is not None:
            _, pairs = birthday.closest_pairs(_PAIRS)
            _, before = share(self.num_samples, trainer.global_rank, trainer.world_size)
            both = gather_chosen(images, before, pairs.T.flatten(), device)
            log_image(trainer, f"{stage}/closest_pairs", image_grid(both / 255, len(pairs), zoom=zoom), step)


def _figures(metric: Metric) -> dict[str, Tensor]:
    value = metric.compute()
    name = "frechet_distance" if isinstance(metric, FrechetDistance) else "kernel_distance"
    return value if isinstance(value, dict) else {name: value}


def _require_sample(module: LightningModule, options: dict[str, Any]) -> None:
    wanted = "sample(num_samples, **options)"
    if not isinstance(module, GenerativeModule):
        raise MisconfigurationException(
            f"GenerativeEvaluation draws images by the module's {wanted}, which {type(module).__name__} lacks: add it, "
            "or remove the callback."
        )
    try:
        takes_generator(module.sample, options)
    except TypeError as error:
        raise MisconfigurationException(
            f"GenerativeEvaluation calls {type(module).__name__}.{wanted} with sample_options={options}, but its "
            f"signature is {inspect.signature(module.sample)}: {error}."
        ) from error
