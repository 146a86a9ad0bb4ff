"""Train small EAEs on one or more processes and save every rank's weights, metrics, codes and prior.

``torchrun --nproc_per_node 2 train_eae.py FOLDER``; the test also calls ``run`` for one process, in its own. All
processes together see the same batches, however many there are.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from rank_script import end, full, sharded, trainer_of

from lightning_plugins import EAE, Digits
from lightning_plugins.core.distributed import close_process_group_at_exit

SMALL = {"image_shape": (1, 8, 8), "latent_dim": 4, "network": "mlp", "width": 16, "num_components": 2}
NO_PICTURES = {"pictures_every_n_epochs": 0}
FLOAT64 = {"precision": "64-true"}  # rounding swaps no neighbours


def sgd(parameters):
    """Unlike Adam it does not blow up the rounding of gradients that batch norm makes zero."""
    return torch.optim.SGD(parameters, lr=0.01)


# name: arguments of EAE, arguments of the Trainer, images in a joined batch, strategy for two processes
CASES = {
    # of 179 validation images the first process has two batches, the other one
    "pictures": ({"optimizer": sgd, "weight": 0.3, "prior": "mixture"}, FLOAT64, 178, "ddp"),
    "conditional": ({"optimizer": sgd, "k": [1, 2], "conditional": True} | NO_PICTURES, FLOAT64, 64, "ddp"),
    "adam-wae": ({"objective": "wae"} | NO_PICTURES, FLOAT64, 64, "ddp"),
    "accumulate-clip": (
        {"optimizer": sgd} | NO_PICTURES,
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        64,
        "ddp",
    ),
    "sharded": ({"optimizer": sgd, "prior": "gaussian", "conditional": True}, {"gradient_clip_val": 0.5}, 64, sharded),
}


class Broadcasts(Callback):
    """Buffers that DDP sends round at each step."""

    def on_train_start(self, trainer, pl_module):
        sent = getattr(trainer.strategy.model, "modules_buffers", [])
        names = {id(buffer): name for name, buffer in pl_module.named_buffers()}
        self.names = sorted(names[id(buffer)] for buffer in sent)


def run(name, folder, processes=1, ckpt_path=None):
    """Train, validate and test one case; write ``rank<r>.pt``."""
    arguments, options, batch, strategy = CASES[name]
    seed_everything(1, verbose=False)
    data = Digits(image_size=8, batch_size=batch // processes, num_train=400, seed=3)
    model = EAE(**(SMALL | arguments))
    broadcasts = Broadcasts()
    trainer = trainer_of(folder, processes, strategy, broadcasts, save_every=4, **options)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    metrics = dict(trainer.callback_metrics)
    metrics |= trainer.test(model, data, verbose=False)[0]
    model.eval()
    result = {
        "weights": {key: full(value) for key, value in model.named_parameters()},
        "norm": {key: full(value) for key, value in model.named_buffers() if key.startswith("batch_norm")},
        "prior": {key: full(value) for key, value in model.prior.named_buffers()},
        "metrics": {key: torch.as_tensor(value) for key, value in metrics.items()},
        "samples": model.sample(5, prior="mixture", generator=torch.Generator().manual_seed(0)),
        "broadcasts": broadcasts.names,
        "strategy": type(trainer.strategy).__name__,
    }
    model.fit_prior(data.test_dataloader())  # of this process's share
    result["refitted"] = {key: full(value) for key, value in model.prior.named_buffers()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    close_process_group_at_exit()
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    for case in CASES:
        run(case, root / case, processes=2)
    run("sharded", root / "resumed", processes=2, ckpt_path=root / "sharded" / "ckpt" / "step=8.ckpt")
    end()
