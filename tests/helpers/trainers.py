"""A Trainer that prints and writes nothing, and a fit by it."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch.utils.data import DataLoader


def quiet_trainer(*callbacks, **options):
    """On the CPU; writes only what a checkpoint callback saves. ``options``, as of a Trainer, come before these."""
    saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    quiet |= {"accelerator": "cpu", "enable_checkpointing": saves}
    return Trainer(callbacks=list(callbacks), **(quiet | options))


def fit(module, data, *callbacks, ckpt_path=None, **options):
    """The Trainer after one epoch, or what ``options`` say, on a list of batches, a loader or a data module."""
    trainer = quiet_trainer(*callbacks, **({"max_epochs": 1} | options))
    trainer.fit(module, DataLoader(data, batch_size=None) if isinstance(data, list) else data, ckpt_path=ckpt_path)
    return trainer


def save(module, path):
    """A checkpoint of a module as it is, as a Trainer made in Python writes it."""
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
