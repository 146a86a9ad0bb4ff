"""Train a small net whose replays fail on one rank; save rows, weights and what was said.

``torchrun --nproc_per_node 2 train_ode_errors.py FOLDER``.
"""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from rank_script import end
from torch.utils.data import DataLoader
from toys import Classifier, mlp
from trainers import quiet_trainer

from lightning_plugins import GradientPenalty, ODEDiagnostics, is_replaying


class Refuses(Classifier):
    """On the second rank alone, from its third batch on, or in every fourth one with ``now_and_then``."""

    def __init__(self, now_and_then):
        super().__init__(mlp(4, 6, 3, seed=1).double())
        self.now_and_then = now_and_then

    def training_step(self, batch, batch_idx):
        bad = batch_idx % 4 == 3 if self.now_and_then else batch_idx > 1
        if is_replaying() and bad and self.trainer.global_rank == 1:
            raise KeyError("y")
        return self.loss(batch)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.trainer.global_rank)
        return DataLoader(
            [
                (torch.randn(6, 4, generator=generator).double(), torch.randint(3, (6,), generator=generator))
                for _ in range(6)
            ],
            batch_size=None,
        )


def run(folder, *callbacks, now_and_then=False):
    """Train; write ``rank<r>.pt``."""
    trainer = quiet_trainer(
        *callbacks,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        max_epochs=1,
    )
    model, raised = Refuses(now_and_then), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(model)
        except RuntimeError as error:
            raised = str(error)
    said = [str(w.message) for w in caught if "ODEDiagnostics" in str(w.message)]
    history = next((c.history for c in callbacks if isinstance(c, ODEDiagnostics)), [])
    weights = [p.detach() for p in model.parameters()]
    folder.mkdir(parents=True, exist_ok=True)
    result = {"weights": weights, "rows": history, "said": said, "raised": raised}
    torch.save(result, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    run(root / "plain")
    for engine in ("auto", "finite_difference"):
        search = {"sharpness_every_n_steps": 2, "sharpness_engine": engine}
        run(root / engine, ODEDiagnostics(1, **search), now_and_then=True)
    run(root / "penalty", GradientPenalty(0.1))
    end()
