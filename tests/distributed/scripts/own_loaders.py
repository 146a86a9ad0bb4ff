"""Loaders that are handed to ``Trainer.fit`` and ``test`` without their data module; the samples seen, per rank.

``torchrun --nproc_per_node 2 own_loaders.py FOLDER``; the test runs :func:`seen` in one process.
"""

import sys
from pathlib import Path

import torch
from rank_script import end
from toys import Squares, mlp
from trainers import quiet_trainer

from lightning_plugins.data import Digits, PromptData, PythonDocstrings


class Watcher(Squares):
    """Remembers the batches that it is given."""

    def __init__(self):
        super().__init__(mlp(1, 1))
        self.batches = {"train": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.batches["train"].append(batch)
        return self.net(torch.ones(1, 1)).sum()

    def test_step(self, batch, batch_idx):
        self.batches["test"].append(batch)


def sources(batch_size):
    """The data modules by name; several processes have the batch of one together."""
    return {
        "digits": Digits(batch_size=batch_size, seed=3),
        "classes": PromptData(num_classes=7, batch_size=batch_size, batches_per_epoch=3, num_eval=25, seed=3),
        "texts": PythonDocstrings(batch_size=batch_size, seed=3, length_grouping=False),
    }


def seen(batch_size, **options):
    """The batches of three steps in each of two epochs, and two of a test, by data module and stage."""
    found = {}
    for name, data in sources(batch_size).items():
        module = Watcher()
        trainer = quiet_trainer(max_epochs=2, limit_train_batches=3, limit_test_batches=2, **options)
        trainer.fit(module, data.train_dataloader())
        trainer.test(module, data.test_dataloader(), verbose=False)
        found[name] = module.batches
    return found


if __name__ == "__main__":
    found = seen(8, devices=2, strategy="ddp")
    torch.save(found, Path(sys.argv[1]) / f"rank{torch.distributed.get_rank()}.pt")
    end()
