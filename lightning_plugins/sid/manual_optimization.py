"""Two networks trained in turn under Lightning: gradients made finite, and the runs that are refused before a step."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_plugins.core.lightning_internals import ddp_option, is_compiled
from lightning_plugins.core.vectors import local
from lightning_plugins.sid.objectives import Draws, Score


@torch.no_grad()
def finite_gradients_(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients without NaN and infinities, in place: 0, and at most 1e5 in size, as in the paper's code.

    Args:
        parameters: each with a gradient, sharded (FSDP2) or whole.
    """
    for gradient in local([parameter.grad for parameter in parameters if parameter.grad is not None]):
        torch.nan_to_num(gradient, nan=0.0, posinf=1e5, neginf=-1e5, out=gradient)


@torch.no_grad()
def clip_values_(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Each entry of the gradients to at most a size, in place.

    Args:
        parameters: each with a gradient, sharded (FSDP2) or whole.
        limit: that size.
    """
    for gradient in local([parameter.grad for parameter in parameters if parameter.grad is not None]):
        gradient.clamp_(-limit, limit)


def refuse_setup(module: LightningModule, trainer: Trainer) -> None:
    """Refuse what cannot train two networks in turn, by small steps.

    Args:
        module: the module in training.
        trainer: its trainer, whose strategy and precision are looked at.

    Raises:
        MisconfigurationException: DDP without ``find_unused_parameters``, the first FSDP, or the module compiled whole.
        ValueError: weights in half precision.
    """
    strategy, precision = trainer.strategy, str(trainer.precision)
    if isinstance(strategy, DDPStrategy) and not ddp_option(strategy, "find_unused_parameters"):
        raise MisconfigurationException(
            "SiD has two optimizers, each of which trains a part of the parameters: under DDP use "
            "strategy='ddp_find_unused_parameters_true'."
        )
    if is_compiled(module):
        raise MisconfigurationException(
            "SiD steps two optimizers and cannot be compiled whole: in place of torch.compile(module) let "
            "build_network call network.compile() before it returns the network."
        )
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            "SiD shards its networks one by one, as FSDP2 can: in place of FSDPStrategy use "
            "ModelParallelStrategy(data_parallel_size=<processes>, tensor_parallel_size=1)."
        )
    if precision in ("16-true", "bf16-true"):
        raise ValueError(
            f"precision={precision!r} keeps the weights in half precision, where the small steps of score distillation "
            f"and of a running mean round to no change: use {precision.replace('true', 'mixed')!r}."
        )


def refuse_endless_decay(trainer: Trainer, decay_from: float) -> None:
    """Refuse rates that begin to fall after a share of a run that has no end.

    Args:
        trainer: whose ``max_steps`` and ``max_epochs`` are looked at.
        decay_from: share of the steps after which the rates fall.

    Raises:
        ValueError: ``decay_from`` is below 1, and the trainer has neither ``max_steps`` nor ``max_epochs``.
    """
    if decay_from < 1 and trainer.max_steps == -1 and trainer.max_epochs == -1:
        raise ValueError(f"decay_from={decay_from} needs an end: give the trainer max_steps or max_epochs.")


def warn_of_a_short_run(trainer: Trainer, seen: int, waits: Mapping[str, int]) -> None:
    """Say that a run ends before something in it begins.

    Args:
        trainer: of the run, whose steps are counted.
        seen: images of all processes in a step.
        waits: arguments that say after how many images something begins; the first one of the run's that is too many
            is named.
    """
    if getattr(trainer, "fast_dev_run", False):
        return
    total = trainer.estimated_stepping_batches * seen
    for name, images in waits.items():
        if images and total - seen < images:
            rank_zero_warn(
                f"{name}={images}: this run ends after {total:,} images, before what waits for that many begins; train "
                "longer, or set it to 0 to begin at once.",
                category=UserWarning,
            )
            return


@torch.no_grad()
def refuse_broken_teacher(teacher: Score, draws: Draws, source: Any) -> None:
    """Refuse a teacher whose denoised images of mere noise are not finite, as those of a damaged file are.

    Args:
        teacher: its denoiser with conditions and guidance.
        draws: noise and levels that it is tried with.
        source: what the teacher was loaded from, for the message.

    Raises:
        ValueError: they are not finite.
    """
    if not teacher(draws.noise * draws.sigma.view(-1, 1, 1, 1), draws.sigma).isfinite().all():
        raise ValueError(f"teacher={source!r} denoises noise to values that are not finite: is its file whole?")


@contextmanager
def checkpoints_by_steps() -> Iterator[None]:
    """Ignore Lightning's warning that ``every_n_train_steps`` saves after an update: that is what is wanted here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization", UserWarning)
        yield
