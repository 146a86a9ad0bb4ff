"""Which checkpoint a trainer is about to load, for what must be known before it is loaded."""

import sys

from lightning.pytorch import Trainer


def checkpoint_to_load(trainer: Trainer | None) -> str | None:
    """Path of the checkpoint that the running ``fit``, ``validate``, ``test`` or ``predict`` was given.

    A network or tokenizer that a checkpoint describes must be built in ``configure_model`` or ``setup``, which come
    before the checkpoint is read. Lightning 2.6 tells ``trainer.ckpt_path`` only afterwards; until then the path is an
    argument of the running ``Trainer._run``, where this function finds it.

    Args:
        trainer: the module's trainer, or ``None`` without one.

    Returns:
        The file, or the folder of a sharded checkpoint; ``None`` if none is to be loaded.
    """
    frame = sys._getframe(1) if trainer is not None else None
    while frame is not None:
        if frame.f_code is Trainer._run.__code__ and frame.f_locals.get("self") is trainer:
            path = frame.f_locals["ckpt_path"]
            return str(path) if path else None
        frame = frame.f_back
    return None
