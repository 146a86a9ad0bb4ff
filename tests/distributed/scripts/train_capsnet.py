"""Train small CapsNets on one or more processes and save every rank's weights and metrics.

``torchrun --nproc_per_node 2 train_capsnet.py FOLDER``; the test also calls ``run`` for one process, in its own. All
processes together see the same batches, however many there are.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from rank_script import end, full, sharded, trainer_of

from lightning_plugins import CapsNet, Digits, MultiMNIST, RandomState

GLOBAL_BATCH = 64
SMALL = {"channels": 8, "kernel_size": 3, "num_types": 2, "decoder_hidden": (16,), "pictures_every_n_epochs": 0}


def sgd(parameters):
    """Unlike Adam it does not blow up the rounding of gradients that are nearly zero."""
    return torch.optim.SGD(parameters, lr=0.1)


# name: arguments of CapsNet, arguments of the Trainer, strategy for two processes
CASES = {
    "pictures": ({"pictures_every_n_epochs": 2, "optimizer": sgd}, {}, "ddp"),
    "adam-no-decoder": ({"reconstruction_weight": 0.0}, {}, "ddp"),
    "accumulate-clip": ({"optimizer": sgd}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2}, "ddp"),
    "pairs": ({"optimizer": sgd}, {}, "ddp"),
    "two-digits-float64": ({"num_labels": 2, "routing": "kmeans"}, {"precision": "64-true"}, "ddp"),
    "sharded": ({"pictures_every_n_epochs": 2}, {"gradient_clip_val": 0.2}, sharded),
}


class Norms(Callback):
    """Gradient norms before clipping, to show that it bites."""

    def __init__(self):
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [full(p.grad).flatten() for p in pl_module.parameters()]
        self.norms.append(torch.cat(grads).norm().item())


class Pairs(Digits):
    """Batches ``(images, labels)``."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch["image"], batch["label"]


def data(name, processes):
    """Digits or pairs of digits; the same global batch for any number of processes."""
    arguments = {"batch_size": GLOBAL_BATCH // processes, "seed": 3}
    if name.startswith("two-digits"):
        return MultiMNIST(base=Digits(image_size=12), shift=2, pad=2, **arguments)
    return (Pairs if name == "pairs" else Digits)(image_size=14, shift=1, **arguments)


def run(name, folder, processes=1, ckpt_path=None):
    """Train, validate and test one case; write ``rank<r>.pt``."""
    arguments, options, strategy = CASES[name]
    seed_everything(1, verbose=False)
    module = data(name, processes)
    model = CapsNet(**(SMALL | arguments), image_shape=module.image_shape)
    norms = Norms()
    trainer = trainer_of(
        folder, processes, strategy, norms, RandomState(), save_every=4, limit_train_batches=6, **options
    )
    trainer.fit(model, module, ckpt_path=ckpt_path)
    metrics = dict(trainer.callback_metrics)
    metrics |= trainer.test(model, module, verbose=False)[0]
    result = {
        "weights": {key: full(value) for key, value in model.named_parameters()},
        "metrics": {key: torch.as_tensor(value) for key, value in metrics.items()},
        "norms": norms.norms,
        "strategy": type(trainer.strategy).__name__,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for case in CASES:
        run(case, root / case, processes=2)
    run("sharded", root / "resumed", processes=2, ckpt_path=root / "sharded" / "ckpt" / "step=8.ckpt")
    end()
