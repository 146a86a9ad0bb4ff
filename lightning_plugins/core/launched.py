"""A module whose training ran in processes that ``fit`` started (``ddp_spawn``, ``ddp_fork``) comes back whole.

Lightning brings home the weights of parts that were there before, and no more: a network that is built when training
starts would be lost, and so would what a checkpoint says beside the weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from lightning_plugins.core.lightning_internals import starts_processes, trainer_of

_RECORD = "launched_fit"  # in the weights on their way home, and nowhere else


def bring_home_whole(module: LightningModule) -> None:
    """Let the weights that come back from the processes of a fit carry the checkpoint's record of the module.

    What the module says in ``on_save_checkpoint`` is read by its ``on_load_checkpoint`` before the weights are loaded,
    as from a file; and the module takes the precision that it was trained in. Call it in the constructor.
    """
    module.register_state_dict_post_hook(_pack)
    module.register_load_state_dict_pre_hook(_unpack)


def _pack(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, LightningModule)
    trainer = trainer_of(module)
    if prefix or trainer is None or not (trainer.state.finished and trainer.state.fn == TrainerFn.FITTING):
        return
    if starts_processes(trainer):
        checkpoint = {"state_dict": dict(state), "global_step": trainer.global_step}
        module.on_save_checkpoint(checkpoint)
        state[_RECORD] = {**checkpoint, "dtype": module.dtype}
        del state[_RECORD]["state_dict"]


def _unpack(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    assert isinstance(module, LightningModule)
    record = None if prefix else state.pop(_RECORD, None)
    if not isinstance(record, Mapping):
        return
    module.on_load_checkpoint({**record, "state_dict": state})
    if record["dtype"] != module.dtype and isinstance(record["dtype"], torch.dtype):
        module.to(record["dtype"])
