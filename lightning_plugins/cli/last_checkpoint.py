"""``last.ckpt`` of every fit of the command line, up to its end; nothing of it under ``fast_dev_run``."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_plugins.core.lightning_internals import last_step_saved, save_last
from lightning_plugins.core.logging import leaves_no_logs


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """The trainer's, without other callbacks that save."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def keep_last(trainer: Trainer) -> None:
    """Let one ``ModelCheckpoint`` keep the last checkpoint, where none was told to and one was not told not to.

    Under ``fast_dev_run`` none does: Lightning's writes that file at the end even then.
    """
    checkpoints = model_checkpoints(trainer)
    if leaves_no_logs(trainer):
        for checkpoint in checkpoints:
            checkpoint.save_last = False
    elif not any(checkpoint.save_last for checkpoint in checkpoints):
        # one that holds weights alone cannot be resumed
        free = [c for c in checkpoints if c.save_last is None and not c.save_weights_only]
        for checkpoint in free[:1]:
            checkpoint.save_last = True


class SaveLast(Callback):
    """Writes ``last.ckpt`` once more at the end of a fit, whose last steps no ``ModelCheckpoint`` may have saved."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save unless this step is saved already."""
        if leaves_no_logs(trainer):
            return
        for checkpoint in model_checkpoints(trainer):
            if checkpoint.save_last is True and last_step_saved(checkpoint) != trainer.global_step:
                save_last(checkpoint, trainer)
