"""Train a small net watched by ODEDiagnostics on one or more processes; save rows and weights.

``torchrun --nproc_per_node 2 train_ode.py FOLDER``. All processes together see the same batches, whatever their number.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rank_script import end, full
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.utils.data import DataLoader
from toys import Classifier, mlp
from trainers import quiet_trainer

from lightning_plugins import Flooding, GradientPenalty, NormRMSprop, ODEDiagnostics
from lightning_plugins.core.sharding import shard_parts

RANKS, MICRO_BATCHES, ROWS = 2, 5, 6


@dataclass(frozen=True)
class Case:
    """One run of five micro-batches of six rows on each of two ranks."""

    optimizer: str = "sgd"
    accumulate: int = 1
    clip: float | None = None
    sharded: bool = False
    engine: str = "finite_difference"
    others: tuple = ()
    strategy: dict = field(default_factory=dict)


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.3, weight_decay=0.1),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "groups": lambda p: SGD([{"params": [q], "lr": 0.3 / (1 + i)} for i, q in enumerate(p)], momentum=0.5),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, centered=True),
    "norm-rmsprop": lambda p: NormRMSprop(p, lr=0.1),
    "adam": lambda p: Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
}
BOTH = (lambda: GradientPenalty(0.1, difference="central"), lambda: Flooding(1.15))
CASES = {
    "sgd": Case(engine="auto"),
    "adam-window": Case("adam", accumulate=2),  # the last one is incomplete
    "groups-clip": Case("groups", clip=0.2, engine="auto"),
    "both": Case("nesterov", accumulate=2, others=BOTH),
    "unused": Case("adamw", strategy={"find_unused_parameters": True}, engine="auto"),
    "static": Case("rmsprop", strategy={"static_graph": True}),
    "views": Case("rmsprop", strategy={"gradient_as_bucket_view": True}),
    "sharded-sgd": Case(sharded=True),
    "sharded-groups": Case("groups", accumulate=2, clip=0.2, sharded=True),
    "sharded-rmsprop": Case("rmsprop", sharded=True),
    "sharded-norm": Case("norm-rmsprop", sharded=True),
    "sharded-adamw": Case("adamw", accumulate=2, sharded=True),
    "sharded-both": Case("adam", accumulate=2, sharded=True, others=BOTH),
}


class Module(Classifier):
    """A perceptron in double precision."""

    def __init__(self, case):
        super().__init__(mlp(4, 6, 3, seed=1).double(), OPTIMIZERS[case.optimizer])
        self.spare = nn.Linear(2, 2).double() if "find_unused_parameters" in case.strategy else None

    def configure_model(self):
        shard_parts(self, self.net)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        batches = []
        for _ in range(MICRO_BATCHES):
            x = torch.randn(RANKS * ROWS, 4, generator=generator, dtype=torch.float64)
            y = torch.randint(3, (RANKS * ROWS,), generator=generator)
            rank, size = self.trainer.global_rank, RANKS * ROWS // self.trainer.world_size
            batches.append((x[rank * size :][:size], y[rank * size :][:size]))
        return DataLoader(batches, batch_size=None)


def strategy(case):
    if case.sharded:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return DDPStrategy(process_group_backend="gloo", **case.strategy)


def run(name, folder, processes=RANKS, watched=True):
    """Train one case; write ``rank<r>.pt``."""
    case = CASES[name]
    search = {"sharpness_every_n_steps": 2, "sharpness_engine": case.engine, "sharpness_rtol": 1e-8}
    diagnostics = ODEDiagnostics(1, tol=0.1, **search)
    trainer = quiet_trainer(
        *([diagnostics] if watched else []),
        *(other() for other in case.others),
        devices=processes,
        strategy="auto" if processes == 1 else strategy(case),
        use_distributed_sampler=False,
        max_epochs=1,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
    )
    model = Module(case)
    trainer.fit(model)
    result = {"weights": [full(p) for p in model.parameters()], "rows": diagnostics.history}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for case in CASES:
        run(case, root / case)
        run(case, root / f"{case}-unwatched", watched=False)
    end()
