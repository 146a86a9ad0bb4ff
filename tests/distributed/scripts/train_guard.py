"""Train with NonFiniteGuard on two processes, one of which gets a NaN; save every rank's weights, steps and sentences.

``torchrun --nproc_per_node 2 train_guard.py FOLDER``.
"""

import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rank_script import end, full, sharded
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from toys import Regression
from trainers import quiet_trainer

from lightning_plugins.callbacks.non_finite_guard.callback import NonFiniteGuard
from lightning_plugins.core.sharding import shard_parts

BATCHES, BAD = 8, 3
# name: policy, strategy, arguments of the Trainer
CASES = {
    "ddp": ("skip", "ddp", {}),
    "ddp-clean": (None, "ddp", {}),
    "ddp-accumulate": ("skip", "ddp", {"accumulate_grad_batches": 2}),
    "ddp-accumulate-clean": (None, "ddp", {"accumulate_grad_batches": 2}),
    "ddp-loss": ("skip", "ddp", {}),
    "ddp-loss-clean": (None, "ddp", {}),
    "sharded": ("skip", sharded, {}),
    "sharded-clean": (None, sharded, {}),
    "ddp-raise": ("raise", "ddp", {}),
    "sharded-raise": ("raise", sharded, {}),
    "sharded-stop": ("stop", sharded, {}),
}


class Net(Regression):
    """Regression with batch norm; the loss may be NaN though its gradient is not."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        norm = nn.Identity() if name.startswith("sharded") else nn.BatchNorm1d(8)
        net = nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), nn.Linear(8, 1))
        super().__init__(net, partial(torch.optim.AdamW, lr=0.05))

    def configure_model(self) -> None:
        shard_parts(self, self.net[0], self.net[3])

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss((batch[0], batch[1].nan_to_num())) + batch[1].sum().mul(0.0)  # a constant


class Steps(Callback):
    """The steps that no gradient was left for."""

    def __init__(self) -> None:
        self.left_out: list[int] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if trainer.global_step and all(param.grad is None for param in params):
            self.left_out.append(trainer.global_step - 1)


def batches(name: str, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Each rank's own; rank 1 has a NaN, in the input or in a constant of the loss; clean runs leave its window out."""
    generator = torch.Generator().manual_seed(rank)
    made = [(torch.randn(4, 4, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(BATCHES)]
    if name.endswith("clean"):
        return made[: BAD - 1] + made[BAD + 1 :] if "accumulate" in name else made[:BAD] + made[BAD + 1 :]
    if rank == 1:
        made[BAD][1 if "loss" in name else 0][2] = float("nan")
    return made


def run(name: str, folder: Path) -> None:
    """Train one case on two processes; write ``rank<r>.pt``."""
    policy, strategy, options = CASES[name]
    steps = Steps()
    guards = [NonFiniteGuard(policy)] if policy else []
    options = options | {"strategy": strategy() if callable(strategy) else strategy}
    trainer = quiet_trainer(*guards, steps, devices=2, max_epochs=1, use_distributed_sampler=False, **options)
    model, said = Net(name), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(model, DataLoader(batches(name, trainer.global_rank), batch_size=None))
        except FloatingPointError as error:
            said = str(error)
    said += "".join(str(warning.message) for warning in caught if "NonFiniteGuard: in" in str(warning.message))
    result = {"left_out": steps.left_out, "said": said, "global_step": trainer.global_step}
    result["state"] = {key: full(value) for key, value in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        run(case, Path(sys.argv[1]) / case)
    end()
