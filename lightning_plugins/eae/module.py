"""EAE as a LightningModule. Shapes: B images, n codes of a process, N of all processes, d latent dimensions."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import ExponentialLR

from lightning_plugins.core import arguments as must
from lightning_plugins.core import random_numbers
from lightning_plugins.core.batches import image_batch, warn_of_range
from lightning_plugins.core.checkpoint_data import read_as_data
from lightning_plugins.core.distributed import gather_rows
from lightning_plugins.core.full_precision import FullPrecisionMean, widen
from lightning_plugins.core.hyperparameters import save_plain_hyperparameters
from lightning_plugins.core.launched import bring_home_whole
from lightning_plugins.core.lightning_internals import trainer_of
from lightning_plugins.core.logging import log_figures, log_losses
from lightning_plugins.core.lr_schedules import optimizer_or_own
from lightning_plugins.core.modes import evaluating
from lightning_plugins.core.pictures import pictures_are_due
from lightning_plugins.core.random_state import draws_of_rank
from lightning_plugins.core.replaced_arguments import Replaced, refuse_replaced
from lightning_plugins.core.sample_keys import SampleKeys, row_keys
from lightning_plugins.core.sharding import gather_for, shard_parts
from lightning_plugins.eae import plots
from lightning_plugins.eae.batch_norm import LatentBatchNorm
from lightning_plugins.eae.diagnostics import latent_diagnostics
from lightning_plugins.eae.entropy import NEIGHBOURS, entropy_gap, gaussian_reference_entropy, several
from lightning_plugins.eae.kept_codes import KeptCodes
from lightning_plugins.eae.networks import Network, build_decoder, build_encoder, decayed_weights
from lightning_plugins.eae.objectives import (
    Codes,
    ObjectiveName,
    Reconstruction,
    check_class_sizes,
    draw_posterior,
    reconstruction_error,
    regularization,
    resolve_objective,
)
from lightning_plugins.eae.paths import PathMode, interpolate_codes
from lightning_plugins.eae.priors import LatentPrior, PriorKind
from lightning_plugins.replay.recorder import is_replaying


@read_as_data
class EAE(LightningModule):
    r"""Entropic autoencoder: batch-normalised codes of maximal entropy are Gaussian, so N(0, I) generates images.

    .. math:: L = \frac1B \sum_i \|x_i - D(z_i)\|^2 - \lambda \hat H(z), \qquad z = \mathrm{BN}(E(x))

    Batch norm without scale and shift gives every latent dimension mean 0 and variance 1; among such distributions
    N(0, I) has the largest entropy. :math:`\hat H` is the nearest-neighbour estimate in nats of the batch's codes, over
    all processes: see :func:`~lightning_plugins.eae.knn_entropy`. The weight :math:`\lambda` is per nat of an image,
    whose error is summed over pixels and channels; with a mean over P values in its place, divide it by P.

    With ``conditional`` it is the entropy within the classes, :math:`\hat H(z \mid y)`
    (:func:`~lightning_plugins.eae.conditional_knn_entropy`): each is to be N(0, I), so that every code goes with every
    class. Classes with k images or fewer in a batch count for nothing in that step, and a first batch of which that is
    more than half is refused.

    Other models on the same networks, for comparison, are named by ``objective``. Batches are dicts
    ``{"image": (B, C, H, W) in [0, 1], "label": (B,) int64}``, pairs of these two, or images; labels are read only with
    ``conditional``.

    At evaluation a VAE decodes its means, and the term beside the error is that of all codes at once (at most 4,096 of
    them, and ``sigreg`` grows with their number): compare ``val/loss`` with ``val/loss``, not with ``train/loss``.

    More neighbours need more codes in one batch: ``accumulate_grad_batches`` does not join batches here, several
    processes do. The ``rae`` network's own batch norms see one process's batch, unless the Trainer has
    ``sync_batchnorm=True``.

    Args:
        image_shape: shape (C, H, W) of the images; a batch of another one is refused.
        num_classes: number of classes J, whose labels are 0 to J - 1; only a conditional model reads them.
        latent_dim: dimensions d of a code; 16 for MNIST and 64 for CelebA in Ghosh et al. 2020, at least 32 for
            CIFAR-10 and CelebA in the paper's supplement.
        network: encoder and decoder. "rae" are the convolutions of Ghosh et al. 2020 for 32 x 32 (also 28 x 28) and
            64 x 64 pixels, which the paper uses; "mlp" has two hidden layers, for small images.
        width: channels of the first convolution of "rae" (128 by default, from the code of Ghosh et al. 2020), or
            units of the hidden layers of "mlp" (256 by default).
        objective: which model is trained. "eae" maximises the entropy of batch-normalised codes; "ae" is
            reconstruction alone, "ae_bn" that with batch norm; "rae_l2" is of Ghosh et al. 2020, "vae" the variational
            autoencoder, "wae" that of Tolstikhin et al. 2018 by MMD; "sigreg" and "mmd" take these distances from
            N(0, I) after batch norm.
        weight: factor, 0 or more, on the term beside the reconstruction error, in error per nat for "eae" and "vae".
            By default 3 for "eae" (the best on MNIST), 0.0128 for "rae_l2", 1 for "vae", 200 for "wae" (its code has
            10 beside 0.05 times the squared error), 10 for "sigreg", 100 for "mmd". With 0 "eae" is "ae_bn", and
            "rae_l2" still decays its decoder.
        k: which nearest neighbour the entropy's estimate takes, or a list of several whose estimates are averaged; 1
            as the paper's supplement advises.
        weight_warmup_steps: optimiser steps in which the weight grows linearly from 0 to its value; 0 for none.
        conditional: whether the decoder is given the class, which is then chosen when sampling. "eae" then maximises
            the entropy within the classes; the terms of other objectives stay those of all codes, which may still
            tell the class.
        reconstruction: error between an image and its reconstruction, summed over pixels and channels. "mse" is the
            squared and "l1" the absolute difference, "bce" the cross entropy in nats.
        prior: distribution that samples are drawn from if nothing else is asked for. "normal" is N(0, I); "gaussian"
            and "mixture" are fitted to the training codes, of which the checkpoint keeps the last 10,000.
        num_components: number of Gaussians in the prior "mixture"; 10 in Ghosh et al. 2020.
        lr: learning rate of Adam; 5e-4 in the code of Ghosh et al. 2020.
        lr_decay: factor in (0, 1] on the learning rate after each epoch; the supplement calls 0.98 or more critical.
        pictures_every_n_epochs: validation epochs from one set of logged pictures to the next; 0 for none.
        optimizer: a factory of an optimizer in place of Adam; it has a rate of its own, and giving lr or lr_decay
            beside it is refused.
        scheduler: a factory of a learning-rate scheduler in place of the decay, stepped once per epoch.

    Raises:
        ValueError: an argument is out of range or does not fit another.

    Example:
        >>> model = EAE(image_shape=(1, 8, 8), latent_dim=8, network="mlp").eval()
        >>> model.encode(torch.zeros(4, 1, 8, 8)).shape
        torch.Size([4, 8])
        >>> model.sample(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3, 1, 8, 8])

    A subclass that overrides a ``build_*`` method sets what that method reads before ``super().__init__()``.

    Source: Ghose, Rashwan, Poupart, UAI 2020, arXiv 2002.10631; also kexue.fm/archives/7343. Another method of 2026,
    arXiv 2605.16164, bears the same name.
    """

    # What an optimizer or a scheduler of the user's takes the place of.
    replaced_by: ClassVar[Replaced] = {("optimizer",): ("lr", "lr_decay"), ("scheduler",): ("lr_decay",)}
    network: Network
    reconstruction: Reconstruction
    default_prior: PriorKind

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        num_classes: int = 10,
        latent_dim: int = 16,
        network: Network = "rae",
        width: int | None = None,
        objective: ObjectiveName = "eae",
        weight: float | None = None,
        k: int | Sequence[int] = 1,
        weight_warmup_steps: int = 0,
        conditional: bool = False,
        reconstruction: Reconstruction = "mse",
        prior: PriorKind = "normal",
        num_components: int = 10,
        lr: float = 5e-4,
        lr_decay: float = 0.98,
        pictures_every_n_epochs: int = 1,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        save_plain_hyperparameters(self)
        bring_home_whole(self)
        _check_arguments(locals())
        refuse_replaced(self, self.replaced_by, optimizer=optimizer, scheduler=scheduler)
        self.objective = resolve_objective(objective, weight)
        self.image_shape, self.num_classes, self.latent_dim = tuple(image_shape), num_classes, latent_dim
        self.network, self.width, self.conditional = network, width, conditional
        self.k = list(k) if isinstance(k, Sequence) else k
        self.weight_warmup_steps, self.reconstruction, self.default_prior = weight_warmup_steps, reconstruction, prior
        self.lr, self.lr_decay, self.pictures_every_n_epochs = lr, lr_decay, pictures_every_n_epochs
        self._optimizer, self._scheduler = optimizer, scheduler

        self.encoder = self.build_encoder()
        self.decoder = self.build_decoder()
        self.batch_norm = LatentBatchNorm(latent_dim) if self.objective.batch_norm else None
        self.prior = LatentPrior(latent_dim, num_components)
        # Every process remembers the codes of all: DDP need not send them round at each step.
        self._ddp_params_and_buffers_to_ignore = [f"prior.{name}" for name, _ in self.prior.named_buffers()]
        self.metrics = nn.ModuleDict({f"{stage}_metrics": self._build_metrics() for stage in ("val", "test")})
        # The entropy is that within the classes.
        self._within_classes = conditional and self.objective.term == "entropy" and self.objective.weight > 0
        self._keys = SampleKeys()
        self._place: tuple[int, ...] = ()  # of the batch that is trained: the run's seed, step and batch
        self._shown: tuple[Tensor, Tensor | None] | None = None  # images that are drawn, with classes if conditional

    # Networks: override any of these two in a subclass.

    def build_encoder(self) -> nn.Module:
        """The network from images to ``(B, d)``, or ``(B, 2 d)`` for the mean and log-variance of a VAE."""
        outputs = self.latent_dim * (2 if self.objective.term == "divergence" else 1)
        return build_encoder(self.network, self.image_shape, outputs, self.width)

    def build_decoder(self) -> nn.Module:
        """The network from ``(B, d)``, with the one-hot class behind it if conditional, to images in [0, 1]."""
        inputs = self.latent_dim + (self.num_classes if self.conditional else 0)
        return build_decoder(self.network, self.image_shape, inputs, self.width)

    def configure_model(self) -> None:
        """Shard the parts under ``ModelParallelStrategy`` (FSDP2); no effect otherwise.

        Raises:
            ValueError: the strategy asks for tensor parallelism, which the networks are not written for.
        """
        widen(self, trainer_of(self))
        if shard_parts(self, self.encoder, self.decoder):
            gather_for(self, "encode", "codes", "decode", "sample", "interpolate", "reconstruct")

    def _build_metrics(self) -> nn.ModuleDict:
        """What is summed up of a stage's images."""
        means = {"reconstruction": FullPrecisionMean(), "divergence": FullPrecisionMean()}
        return nn.ModuleDict({**means, "codes": KeptCodes(latent_dim=self.latent_dim)})

    # What the networks compute.

    def forward(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """Reconstructions ``(B, C, H, W)`` in [0, 1]."""
        return self.decode(self.encode(image), label)

    def encode(self, image: Tensor) -> Tensor:
        """Codes ``(B, d)``: a VAE's are the means; in evaluation each depends on its image alone."""
        self._check_image(image)
        h = self.encoder(image.to(self._dtype_of(self.encoder)))[:, : self.latent_dim]
        return h if self.batch_norm is None else self.batch_norm(h)

    def decode(self, z: Tensor, label: Tensor | None = None) -> Tensor:
        """Images ``(B, C, H, W)`` in [0, 1] of codes ``(B, d)`` and, if conditional, classes ``(B,)``."""
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"Codes must be (B, latent_dim={self.latent_dim}), got {tuple(z.shape)}.")
        z = z.to(self._dtype_of(self.decoder))  # batch norm widens half precision
        if self.conditional:
            if label is None:
                raise ValueError("This EAE is conditional: its decoder needs a class for each code, label=(B,) int64.")
            z = torch.cat([z, torch.nn.functional.one_hot(label, self.num_classes).to(z)], dim=1)
        elif label is not None:
            raise ValueError("A class was given, but this EAE is not conditional: train one with conditional=True.")
        return self.decoder(z)

    def _dtype_of(self, network: nn.Module) -> torch.dtype:
        """The type of its weights: Lightning's own ``dtype`` does not know of ``module.bfloat16()``."""
        return next((weight.dtype for weight in network.parameters()), cast(torch.dtype, self.dtype))

    def reconstruct(self, image: Tensor, label: Tensor | None = None) -> Tensor:
        """The images as the codes know them; ``forward`` by its name."""
        return self(image, label)

    def codes(self, image: Tensor, label: Tensor | None = None) -> Codes:
        """What the decoder reads in training, and what the regulariser sees: the codes of all processes.

        Args:
            image: ``(B, C, H, W)`` in [0, 1].
            label: ``(B,)`` classes, read where the entropy is that within classes.
        """
        self._check_image(image)
        h = self.encoder(image.to(self._dtype_of(self.encoder)))
        h = h.to(torch.promote_types(h.dtype, torch.float32))
        labels = self._labels_of_all(label) if self._within_classes else None
        if self.batch_norm is not None:
            every, own = self.batch_norm.all_rows(h)
            return Codes(every[own].clone(), every, labels=labels)  # FSDP2 warns of views
        if self.objective.term == "divergence":
            noise = self._generator(row_keys(self, len(h))) if self.training else None
            z, mean, divergence = draw_posterior(h, noise)
            return Codes(z, self._all_rows(mean), divergence)
        return Codes(h, self._all_rows(h))

    def _labels_of_all(self, label: Tensor | None) -> Tensor:
        if label is None:
            raise ValueError("This EAE is conditional: its entropy needs the class of each image, label=(B,) int64.")
        return self._all_rows(label)

    def _all_rows(self, h: Tensor) -> Tensor:
        return gather_rows(h)[0] if self.training else h  # ranks may have different numbers of validation batches

    def _check_image(self, image: Tensor) -> None:
        if tuple(image.shape[1:]) != self.image_shape:
            raise ValueError(f"EAE was built for image_shape={self.image_shape}, got images {tuple(image.shape[1:])}.")

    def _generator(self, rows: Tensor | None = None) -> torch.Generator:
        """Random numbers of this batch: of these rows, or the same on all processes; not of the global random state."""
        if not self.training:  # every evaluation draws the same: its numbers compare
            return random_numbers.generator(self.device)
        place = self._place or (torch.initial_seed(), self.global_step)
        if rows is not None:
            return random_numbers.RowGenerator(rows, *place)
        return random_numbers.generator(self.device, *place)

    # Samples.

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        *,
        labels: Tensor | None = None,
        prior: PriorKind | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images, with the networks in evaluation mode.

        Args:
            num_samples: number of images n, 0 or more.
            labels: ``(n,)`` int64 classes of a conditional model; uniform at random by default.
            prior: what codes are drawn from, ``normal``, ``gaussian`` or ``mixture``; the constructor's by default. The
                last two are fitted to the remembered training codes, unless :meth:`fit_prior` came after these.
            temperature: factor on the codes' standard deviation, 0 or more; below 1 they are nearer to the middle.
            generator: source of the draws, on any device; torch's own by default.

        Returns:
            ``(n, C, H, W)`` in [0, 1], float32.

        Raises:
            ValueError: classes for a model that has none, or a prior without codes to be fitted to.
        """
        must.whole(0)("num_samples", num_samples)
        if labels is not None and not self.conditional:
            raise ValueError("labels were given, but this EAE is not conditional: train one with conditional=True.")
        z = self.prior.sample(num_samples, prior or self.default_prior, temperature, generator).to(self.device)
        if self.conditional and labels is None:
            device = generator.device if generator is not None else self.device
            labels = torch.randint(self.num_classes, (num_samples,), generator=generator, device=device)
        if labels is not None:
            labels = self._check_labels(labels.to(self.device), num_samples)
        with evaluating(self):
            return self.decode(z, labels).float()

    @torch.no_grad()
    def interpolate(
        self,
        a: Tensor,
        b: Tensor,
        num_steps: int = 8,
        mode: PathMode = "linear",
        labels: Tensor | None = None,
    ) -> Tensor:
        """Images on the way from images ``a`` to images ``b``, in the codes.

        Args:
            a: ``(B, C, H, W)`` images in [0, 1] where the ways begin.
            b: ``(B, C, H, W)`` images in [0, 1] where they end.
            num_steps: images S on each way, 2 or more, both reconstructions included.
            mode: ``linear``, or ``slerp`` along a great circle.
            labels: ``(B,)`` classes to decode as, if the model is conditional.

        Returns:
            ``(B, S, C, H, W)`` in [0, 1], float32.

        Raises:
            ValueError: as many images are not on both ends, ``num_steps`` is below 2, or classes do not fit.
        """
        if len(a) != len(b):
            raise ValueError(f"Both ends need as many images, got {len(a)} and {len(b)}.")
        if labels is not None:
            labels = self._check_labels(labels.to(self.device), len(a)).repeat_interleave(num_steps)
        with evaluating(self):
            z = interpolate_codes(self.encode(a).float(), self.encode(b).float(), num_steps, mode)
            return self.decode(z.flatten(0, 1), labels).float().unflatten(0, (len(a), num_steps))

    @torch.no_grad()
    def fit_prior(self, dataloader: Iterable[Any]) -> None:
        """Fit the Gaussian and the mixture to the codes of all images, in evaluation mode.

        Without this call they are fitted to the last 10,000 codes of training, which is nearly the same. Training that
        goes on makes the fit out of date.

        Args:
            dataloader: batches as in training. Over several processes each calls this with its
                share of them, under FSDP2 in as many batches; all fit the same.

        Raises:
            ValueError: fewer images than the mixture has components.
        """
        codes = [torch.empty(0, self.latent_dim, device=self.device)]  # a process may have no share
        with evaluating(self):
            for batch in dataloader:
                images = image_batch(batch, type(self).__name__)["image"]
                codes.append(self.encode(images.to(self.device)).float())
        self.prior.fit(gather_rows(torch.cat(codes))[0])

    def _check_labels(self, labels: Tensor, count: int) -> Tensor:
        must.class_labels(labels, count, self.num_classes)
        return labels.long()

    # Training: a step, its loss, and what is logged of it.

    def _read(self, batch: Any) -> tuple[Mapping[str, Tensor], Tensor | None]:
        """A batch as a dict, and the labels of a conditional model."""
        batch = image_batch(batch, type(self).__name__, labels=self.conditional)
        return batch, batch["label"] if self.conditional else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sum the terms of :meth:`loss` and log them, and how far the codes' entropy is from a Gaussian's."""
        # The step alone would give the same noise to all batches of one accumulated gradient.
        self._place = torch.initial_seed(), self.global_step, batch_idx
        with draws_of_rank(self, self.global_step, batch_idx):
            return self._train(batch, batch_idx)

    def _train(self, batch: Any, batch_idx: int) -> Tensor:
        batch, label = self._read(batch)
        if batch_idx == 0:  # once an epoch, as it waits for the device
            warn_of_range(batch["image"], type(self).__name__)
            if label is not None:
                self._check_labels(label, len(batch["image"]))
        codes = self.codes(batch["image"], label)
        if batch_idx == 0 and codes.labels is not None:
            check_class_sizes(codes.labels, self.k)
        terms = self.loss(batch, codes)
        loss = torch.stack([*terms.values()]).sum()
        self.prior.remember(codes.all.detach())
        if not is_replaying():
            self._log_step(loss, terms, codes)
        return loss

    def loss(self, batch: Mapping[str, Tensor], codes: Codes | None = None) -> dict[str, Tensor]:
        """The named terms whose sum is trained: ``reconstruction`` and, with a weight, ``regularization``.

        Args:
            batch: images and, if conditional, labels, as the class documents them.
            codes: ``self.codes(batch["image"], batch["label"])`` where they have been computed already.
        """
        batch, label = self._read(batch)
        codes = self.codes(batch["image"], label) if codes is None else codes
        decoded = self.decode(codes.own, label)
        error = reconstruction_error(decoded, batch["image"], self.reconstruction).mean()
        weight = self.current_weight()
        if not weight:
            return {"reconstruction": error}
        draws = self._generator() if self.objective.draws else None
        term = regularization(self.objective, codes, self.k, draws)
        return {"reconstruction": error, "regularization": weight * term}

    def current_weight(self) -> float:
        """The weight of the regulariser at this step of its warm-up."""
        if not self.training or not self.weight_warmup_steps:
            return self.objective.weight
        return self.objective.weight * min(1.0, self.global_step / self.weight_warmup_steps)

    def _log_step(self, loss: Tensor, terms: Mapping[str, Tensor], codes: Codes) -> None:
        size = len(codes.own) * self.trainer.world_size  # Lightning averages the ranks' sizes and rounds down
        log_losses(self, "train", loss, terms, rows=len(codes.own))
        if self.objective.term == "entropy" and "regularization" in terms:
            if self._within_classes:
                gap = entropy_gap(codes.all.detach(), self.k)
            else:
                reference = gaussian_reference_entropy(len(codes.all), self.latent_dim, self.k)
                gap = -terms["regularization"].detach() / self.current_weight() - reference
            self.log("train/entropy_gap", gap, prog_bar=True, batch_size=size)

    def on_train_end(self) -> None:
        """Fit the priors to the newest training codes, for what is saved from here on."""
        if not self.prior.is_fitted and self.prior.can_be_fitted:
            self.prior.fit()

    # Evaluation.

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Sum up errors and codes; keep the first images for the pictures."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Sum up errors and codes; keep the first images for the pictures."""
        self._evaluate(batch, batch_idx, "test")

    def on_validation_epoch_end(self) -> None:
        """Log errors and diagnostics of all codes; draw the pictures on their cadence."""
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log errors and diagnostics of all codes; draw the pictures of the test images."""
        self._end_evaluation("test")

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        batch, label = self._read(batch)
        images = batch["image"]
        codes = self.codes(images, label)
        decoded = self.decode(codes.own, label)
        metrics: Any = self.metrics[f"{stage}_metrics"]
        metrics["reconstruction"].update(reconstruction_error(decoded, images, self.reconstruction))
        metrics["codes"].update(codes.own, codes.labels, self._keys(self, len(images), batch, batch_idx))
        if codes.divergence is not None:
            metrics["divergence"].update(codes.divergence)
        if batch_idx == 0:
            self._shown = images[:_NUM_SHOWN], None if label is None else label[:_NUM_SHOWN]

    @torch.no_grad()
    def _end_evaluation(self, stage: str) -> None:
        codes = self._log_evaluation(stage)
        if self._shown is None or not pictures_are_due(self, self.pictures_every_n_epochs):
            return  # None: a subclass with evaluation steps of its own
        # Every rank computes, because a sharded forward is collective; rank zero writes.
        log_figures(self.trainer, stage, plots.eae_figures(self, *self._shown, codes), self.global_step)
        self._shown = None

    def _log_evaluation(self, stage: str) -> Tensor:
        """Log the means over the stage's images, and return its codes, of all processes.

        The regulariser is that of all codes at once: estimates of small last batches would not compare.
        """
        metrics: Any = self.metrics[f"{stage}_metrics"]
        z, labels = metrics["codes"].labelled_codes()
        error = metrics["reconstruction"].compute()
        terms = {"reconstruction": error}
        if len(z) > max(several(self.k)):
            terms |= {name: value.to(error) for name, value in latent_diagnostics(z, self.k).items()}
            if self.objective.weight:
                divergence = metrics["divergence"].compute() if self.objective.term == "divergence" else None
                codes = Codes(z, z, divergence, labels if self._within_classes else None)
                draws = self._generator() if self.objective.draws else None
                terms["regularization"] = self.objective.weight * regularization(self.objective, codes, self.k, draws)
            terms["loss"] = error + terms.get("regularization", 0)
        elif not self.trainer.sanity_checking:
            warnings.warn(
                f"{len(z)} {stage} images are too few for an entropy: {stage}/loss is not logged.", stacklevel=1
            )
        for metric in metrics.values():
            metric.reset()
        # The same on all processes already; Lightning would advise it.
        self.log_dict({f"{stage}/{name}": value for name, value in terms.items()}, sync_dist=True)
        return z

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """``code`` ``(B, d)``, ``reconstruction`` ``(B, C, H, W)`` and ``error``, its mean squared distance."""
        batch, label = self._read(batch)
        z = self.encode(batch["image"])
        reconstruction = self.decode(z, label)
        error = (reconstruction - batch["image"]).square().flatten(1).mean(1)
        return {"code": z, "reconstruction": reconstruction, "error": error}

    def configure_optimizers(self) -> Any:
        """Adam whose rate decays after each epoch, unless ``optimizer`` or ``scheduler`` is given."""
        groups: Any = self.parameters()
        if decay := self.objective.decoder_decay:
            decayed = decayed_weights(self.decoder)
            kernels = set(decayed)
            groups = [
                {"params": [p for p in self.parameters() if p not in kernels]},
                {"params": decayed, "weight_decay": decay},
            ]
        schedule = None if self.lr_decay == 1 else lambda adam: ExponentialLR(adam, self.lr_decay)
        return optimizer_or_own(groups, lambda g: Adam(g, self.lr), schedule, self._optimizer, self._scheduler)


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse what no other check sees, in one sentence."""
    must.check(
        arguments,
        image_shape=must.image_shape,
        num_classes=must.count,
        latent_dim=must.count,
        k=NEIGHBOURS,
        weight_warmup_steps=must.whole(0),
        conditional=must.flag,
        reconstruction=must.one_of(Reconstruction),
        prior=must.one_of(PriorKind),
        num_components=must.count,
        lr=must.positive,
        lr_decay=must.number(above=0, most=1, why="the factor after each epoch"),
        pictures_every_n_epochs=must.whole(0, why="0 is for none"),
        optimizer=must.optional(must.function),
        scheduler=must.optional(must.function),
    )


_NUM_SHOWN = 10
