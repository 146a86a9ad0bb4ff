"""Train with dropout on one or two processes and go on with another number; save what each draws after the resume.

``torchrun --nproc_per_node 2 resume_ranks.py FOLDER CHECKPOINT``: a fit of two processes from the start, and one that
goes on from the checkpoint of one process. The test calls ``run`` for one process, in its own.
"""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from rank_script import end
from toys import ImageClassifier
from trainers import quiet_trainer

from lightning_plugins import Digits, RandomState
from lightning_plugins.core.distributed import close_process_group_at_exit

JOINED = 32  # images in a batch of all processes: the data go on exactly
STEPS = 6


class Drops(ImageClassifier):
    """Keeps what each step drew, and how much was to be drawn when training began."""

    def __init__(self):
        super().__init__(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10)))
        self.drawn, self.images = [], []

    def on_fit_start(self):
        torch.manual_seed(self.global_rank)  # Lightning seeds all processes alike; a checkpoint's states come later

    def training_step(self, batch, batch_idx):
        self.drawn.append(torch.rand(()).item())
        self.images.append(int((batch["image"] * 1000).sum()))
        return self.loss(batch)


def run(folder, processes, ckpt_path=None, max_steps=STEPS):
    """Write ``rank<r>.pt`` with the numbers, the images and the warnings."""
    seed_everything(1, verbose=False, workers=False)
    module = Drops()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    strategy = "auto" if processes == 1 else "ddp"
    data = Digits(image_size=8, batch_size=JOINED // processes, num_train=10 * JOINED, seed=3)
    trainer = quiet_trainer(
        RandomState(), saving, devices=processes, strategy=strategy, max_steps=max_steps, limit_val_batches=0
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(module, data, ckpt_path=ckpt_path)
    sentences = [str(warning.message) for warning in said if "RandomState" in str(warning.message)]
    found = {"drawn": module.drawn, "images": module.images, "said": sentences, "steps": trainer.global_step}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    close_process_group_at_exit()
    torch.set_num_threads(1)
    root, checkpoint = map(Path, sys.argv[1:])
    run(root / "two", 2, max_steps=3)
    run(root / "one-to-two", 2, checkpoint)
    end()
