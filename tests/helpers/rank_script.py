"""What the scripts of tests/distributed/scripts share: the Trainer of a case, whole tensors, a clean end."""

import os

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from trainers import quiet_trainer


def sharded():
    """FSDP2 over two processes."""
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def trainer_of(folder, processes, strategy, *callbacks, save_every, **options):
    """Two epochs on one process or several, with logs in ``folder`` and checkpoints in ``folder / "ckpt"``.

    ``strategy``, a name or what makes one, is for several processes.
    """
    saving = ModelCheckpoint(folder / "ckpt", "{step}", every_n_train_steps=save_every, save_top_k=-1)
    return quiet_trainer(
        *callbacks,
        saving,
        devices=processes,
        strategy="auto" if processes == 1 else strategy() if callable(strategy) else strategy,
        logger=CSVLogger(folder, name="logs"),
        max_epochs=2,
        log_every_n_steps=1,
        **options,
    )


def full(tensor):
    """A copy of the whole of a tensor, which may be sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def end():
    """Leave together, at once: a thread of gloo may abort the interpreter's own end, long after all is written."""
    torch.distributed.barrier()
    os._exit(0)
