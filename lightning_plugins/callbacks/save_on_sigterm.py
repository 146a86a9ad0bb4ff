"""A checkpoint at the moment a run is asked to stop, between two optimizer steps."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_plugins.core.lightning_internals import save_last


class SaveOnSigterm(Callback):
    """Write last.ckpt when SIGTERM arrives (kill, docker stop, a scheduler), so that no step is lost.

    Lightning finishes the batch and then leaves; here the checkpoint is written in between, in the folder of the run's
    ``ModelCheckpoint``, whether that keeps a last checkpoint or not. The command line adds this callback to every run.

    - Only a state between two optimizer steps is written. A signal in the middle of accumulated batches or of a
      validation leaves the newest checkpoint as it is, to be resumed as exactly.
    - So does Ctrl-C, which stops in the middle of a step. ``ModelCheckpoint(save_on_exception=True)`` would write that
      state, and a run resumed from it is no longer that of a run which never stopped.
    - With several processes, and with ``save_last="link"``, nothing is written either.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SaveOnSigterm()], logger=False, accelerator="cpu")
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if asked to stop; ``ModelCheckpoint`` itself comes later and does not save the same step twice."""
        # several processes do not learn of a signal at the same batch, and saving needs all of them
        if not trainer.received_sigterm or trainer.world_size > 1 or trainer.fast_dev_run:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        callbacks = [
            c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.save_last != "link"
        ]
        if callbacks:
            checkpoint = max(callbacks, key=lambda c: bool(c.save_last))
            checkpoint.save_last = True
            save_last(checkpoint, trainer)
