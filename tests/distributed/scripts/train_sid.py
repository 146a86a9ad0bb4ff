"""Distil a tiny teacher on one or more processes and save every rank's weights and samples.

``torchrun --nproc_per_node 2 train_sid.py FOLDER TEACHER``; the test also calls ``run`` for one process, in its own.
All processes together draw the same random numbers, however many there are.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rank_script import end, full, sharded, trainer_of
from trainers import quiet_trainer

from lightning_plugins.core.distributed import close_process_group_at_exit
from lightning_plugins.core.sample_keys import row_keys
from lightning_plugins.sid.module import SiD

RANKS, ROWS = 2, 4


def sgd(lr, fake_lr):
    """Unlike Adam it does not blow up the rounding of gradients that are nearly zero."""
    first, second = (partial(torch.optim.SGD, lr=rate) for rate in (lr, fake_lr))
    return {"optimizer": first, "fake_optimizer": second}


DDP = "ddp_find_unused_parameters_true"
# name: arguments of SiD, strategy for two processes
CASES = {
    "accumulate": ({"accumulate": 2, "decay_from": 0.5, "fake_steps": 2, **sgd(1e-5, 1e-6)}, DDP),
    "spoilt": (sgd(1e-5, 1e-6), DDP),
    "adversarial": (
        {
            "adversarial": True,
            "alpha": 1.0,
            "accumulate": 2,
            "generator_after_images": 8,
            "adversarial_after_images": 16,
            "fake_clip_value": 50.0,
            **sgd(1e-5, 1e-6),
        },
        DDP,
    ),
    "sharded": ({"accumulate": 2, "gradient_clip": 1.0, **sgd(1e-2, 1e-2)}, sharded),
    "sharded-adam": ({"num_pictures": 2, "teacher_steps": 2, "lr": 1e-3, "fake_lr": 1e-3}, sharded),
}


class Spoilt(SiD):
    """A sample, of two processes the second one's, is not a number in one update."""

    spoilt = False

    def _draw(self, n, turn):
        draws = super()._draw(n, turn)
        if self.spoilt and self._updates == 1:
            draws.latent[row_keys(self, n) == 3] = float("nan")
        return draws


class WithImages(Spoilt):
    """Real images for SiDA: of all processes together the same, however many there are."""

    def training_step(self, batch, batch_idx):
        if self.adversarial:
            keys = row_keys(self, len(batch["index"])).tolist()
            rows = [torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(int(key))) for key in keys]
            batch = {"image": torch.stack(rows)}
        super().training_step(batch, batch_idx)


class Lost(Callback):
    """How many samples were left out in each update."""

    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, trainer, *_):
        self.counts.append(int(trainer.callback_metrics["train/nonfinite_samples"]))


def run(name, folder, teacher, processes=1, ckpt_path=None):
    """Train one case; write ``rank<r>.pt``."""
    arguments, strategy = CASES[name]
    settings = {"num_pictures": 0, "updates_per_epoch": 2, "batch_size": RANKS * ROWS // processes}
    model = WithImages(teacher=str(teacher), **(settings | arguments))
    model.spoilt = name == "spoilt"
    lost = Lost()
    trainer = trainer_of(folder, processes, strategy, lost, save_every=2)
    trainer.fit(model, ckpt_path=ckpt_path)
    result = {
        "weights": {key: full(value) for key, value in model.named_parameters()},
        "teacher": {key: full(value) for key, value in model.teacher.network.named_parameters()},
        "sharded": sorted(
            {key.split(".")[1] for key, value in model.named_parameters() if hasattr(value, "placements")}
        ),
        "sharded_teacher": all(hasattr(value, "placements") for value in model.teacher.network.parameters()),
        "sample": model.sample(3, generator=torch.Generator().manual_seed(0)),
        "lost": lost.counts,
        "counted": [trainer.global_step, model.images],
        "strategy": type(trainer.strategy).__name__,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")
    return model


def refused(teacher):
    """What plain DDP is answered."""
    model = SiD(teacher=str(teacher), num_pictures=0)
    try:
        quiet_trainer(devices=RANKS, strategy="ddp", max_steps=1).fit(model)
    except MisconfigurationException as error:
        return str(error)


if __name__ == "__main__":
    close_process_group_at_exit()
    torch.set_num_threads(1)
    root, teacher = map(Path, sys.argv[1:])
    for case in CASES:
        model = run(case, root / case, teacher, processes=RANKS)
        if case == "accumulate":
            model.export(root / "student")  # by all at once
            path = root / case / "ckpt" / "step=4.ckpt"
            reloaded = SiD.load_from_checkpoint(path, map_location="cpu", **sgd(1e-5, 1e-6))
            reloaded.export(root / "reloaded")
    run("sharded-adam", root / "resumed", teacher, RANKS, root / "sharded-adam" / "ckpt" / "step=2.ckpt")
    message = refused(teacher)
    (root / f"refused{torch.distributed.get_rank()}.txt").write_text(message or "")
    end()
