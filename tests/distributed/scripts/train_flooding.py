"""Train with Flooding on one or more processes and save every rank's weights, signs and logs.

``torchrun --nproc_per_node 2 train_flooding.py FOLDER``. All processes together see the same batches, however many
there are; the losses of the two ranks lie on different sides of the level.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rank_script import end, full
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from toys import Regression, mlp
from trainers import quiet_trainer

from lightning_plugins.callbacks.flooding.callback import Flooding
from lightning_plugins.core.sharding import shard_parts

LEVEL, BATCH, SAMPLES, EPOCHS, LR = 0.6, 8, 24, 3, 0.3


def sharded() -> ModelParallelStrategy:
    """FSDP2 over two processes."""
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")


# name: scope, strategy for two processes, arguments of the Trainer
CASES = {
    "step": ("step", "ddp", {}),
    "microbatch": ("microbatch", "ddp", {}),
    "step-accumulate": ("step", "ddp", {"accumulate_grad_batches": 2}),  # of 3 batches: the last window is cut short
    "microbatch-accumulate": ("microbatch", "ddp", {"accumulate_grad_batches": 2}),
    "step-unused": ("step", "ddp_find_unused_parameters_true", {"gradient_clip_val": 0.5}),
    "step-views": ("step", lambda: DDPStrategy(gradient_as_bucket_view=True, static_graph=True), {}),
    "step-sharded": ("step", sharded, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    "microbatch-sharded": ("microbatch", sharded, {}),
}


def data() -> TensorDataset:
    """In each batch the second half's targets are larger, so its loss is."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    size = torch.tensor([0.3, 1.5]).repeat_interleave(BATCH // 2).repeat(SAMPLES // BATCH)
    return TensorDataset(x, x.sum(1, keepdim=True).sin() * size[:, None])


class Net(Regression):
    """An MLP of which a part may be unused, in float64 (which FSDP2 has no name for as a precision)."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__(mlp(4, 8, 1, seed=0), partial(torch.optim.SGD, lr=LR))
        self.unused = nn.Linear(4, 4) if unused else None
        self.double()

    def configure_model(self) -> None:
        shard_parts(self, self.net[0], self.net[2])


class Seen(Callback):
    """The sign and the logs of every step, and this rank's losses."""

    def __init__(self) -> None:
        self.signs, self.logs, self.losses = [], [], []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        self.signs.append(trainer.callbacks[0].sign.item())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict, batch: object, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        self.logs.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def run(name: str, folder: Path) -> None:
    """Train one case on two processes; write ``rank<r>.pt``."""
    scope, strategy, options = CASES[name]
    seen = Seen()
    trainer = quiet_trainer(
        Flooding(LEVEL, scope),
        seen,
        devices=2,
        strategy=strategy() if callable(strategy) else strategy,
        max_epochs=EPOCHS,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        **options,
    )
    half = BATCH // 2
    mine = [i for i in range(SAMPLES) if i % BATCH // half == trainer.global_rank]
    model = Net(unused=name == "step-unused")
    trainer.fit(model, DataLoader(Subset(data(), mine), half))
    result = {"signs": seen.signs, "logs": seen.logs, "losses": seen.losses}
    result["weights"] = {key: full(value) for key, value in model.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        run(case, Path(sys.argv[1]) / case)
    end()
