"""A checkpoint at the moment a run is asked to stop, between two optimizer steps."""

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch.distributed
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_plugins.callbacks.run_checks import NeedsTrainer
from lightning_plugins.core import arguments as must
from lightning_plugins.core.distributed import largest_over_ranks
from lightning_plugins.core.lightning_internals import (
    environment,
    handler_before,
    save_last,
    starts_processes,
    stop_as_by_sigterm,
)


class SaveOnSigterm(NeedsTrainer):
    """Write last.ckpt when a signal arrives (kill, docker stop, a scheduler), so that no step is lost, and stop.

    Lightning finishes the batch and then leaves; here the checkpoint is written in between, in the folder of the run's
    ``ModelCheckpoint``, whether that keeps a last checkpoint or not. The process ends with status 128 and the signal's
    number, 143 for SIGTERM. The command line adds this callback to every run.

    - Only a state between two optimizer steps is written. With one process, a signal in the middle of accumulated
      batches or of a validation leaves the newest checkpoint as it is, to be resumed as exactly.
    - With several processes it is enough that one of them has the signal: after each optimizer step they ask each
      other, and all save and stop at the same one. During a validation nobody asks; the step after it is the next.
    - Ctrl-C stops in the middle of a step. ``ModelCheckpoint(save_on_exception=True)`` would write that state, and a
      run resumed from it is no longer that of a run which never stopped.
    - Under SLURM, where Lightning saves and queues the job again at a signal of its own (SIGUSR1 unless told
      otherwise), that signal stays Lightning's; ``SLURMEnvironment(auto_requeue=False)`` frees it.
    - With ``save_last="link"`` nothing is written.

    Args:
        signals: names of the signals at which the run saves and stops; a scheduler may be told to send SIGUSR1 some
            minutes before its time limit.

    Raises:
        MisconfigurationException: a signal is the one at which Lightning queues the job again.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SaveOnSigterm()], logger=False, accelerator="cpu")
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM",)) -> None:
        must.check(locals(), signals=must.each(must.one_of(_NAMES), of="names of signals"))
        self.signals = tuple(signals)
        self._received = 0
        self._group: Any = None  # a process group once training has begun

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what is Lightning's."""
        cluster = environment(trainer)
        requeue = cluster.requeue_signal if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue else None
        if requeue is not None and requeue.name in self.signals:
            raise MisconfigurationException(
                f"SaveOnSigterm: signals={[*self.signals]}, but at {requeue.name} Lightning saves and queues this "
                "SLURM job again: leave it out, or give the trainer plugins=SLURMEnvironment(auto_requeue=False)."
            )
        self._received, self._group = 0, None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen from here on: Lightning has set its own handlers by now."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen; and give the processes a line of their own, on which none waits for a GPU."""
        self._listen(trainer)
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            self._group = torch.distributed.new_group(backend="gloo")

    def _listen(self, trainer: Trainer) -> None:
        """Handle the signals, but leave SIGTERM of one process to Lightning.

        Lightning's own handler talks to the other processes from wherever the signal found this one, and may hang both.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for name in self.signals:
            number = signal.Signals[name]
            if number != signal.SIGTERM or trainer.world_size > 1:
                signal.signal(number, _Note(self, trainer, handler_before(trainer, number)))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if asked to; ``ModelCheckpoint`` itself comes later and does not save the same step twice."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        if trainer.received_sigterm:
            self._received = self._received or int(signal.SIGTERM)
        if self._group is not None:
            self._received = largest_over_ranks(self._received, torch.device("cpu"), self._group)
        if not self._received:
            return
        self._save(trainer)
        stop_as_by_sigterm(trainer)
        if starts_processes(trainer):  # nobody would tell the one that waits for this process how it ended
            raise SIGTERMException(128 + self._received)

    def _save(self, trainer: Trainer) -> None:
        callbacks = [
            c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.save_last != "link"
        ]
        if callbacks and not trainer.fast_dev_run:
            checkpoint = max(callbacks, key=lambda c: bool(c.save_last))
            checkpoint.save_last = True
            save_last(checkpoint, trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the process's status tell the signal."""
        if isinstance(exception, SIGTERMException) and exception.code is None:
            exception.code = 128 + int(self._received or signal.SIGTERM)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the line: another run may have other processes."""
        self._group = None


class _Note:
    """A handler that notes the signal for the end of the step, and lets the user's own handler run."""

    def __init__(self, callback: SaveOnSigterm, trainer: Trainer, before: Any) -> None:
        self._callback, self._trainer, self._before = callback, trainer, before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._callback._received = number
        if self._trainer.world_size == 1:
            stop_as_by_sigterm(self._trainer)
        if callable(self._before):
            self._before(number, frame)


_NAMES = tuple(name for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU") if hasattr(signal, name))
