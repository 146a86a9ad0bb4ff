"""Under torchrun: sharded checkpoints in folders are replaced as a whole, or stay. ``save_folders.py FOLDER``."""

import sys
from functools import partial
from pathlib import Path

import torch
from rank_script import end, sharded
from torch import nn
from toys import ImageClassifier
from trainers import quiet_trainer

from lightning_plugins import Digits, keep_checkpoints_whole
from lightning_plugins.core.sharding import shard_parts


class Net(ImageClassifier):
    """A layer of sharded weights."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), partial(torch.optim.Adam, lr=1e-2))

    def configure_model(self):
        shard_parts(self, self.net)


def fit(folder, steps, ckpt_path=None):
    """A trainer that has trained and saved nothing."""
    options = {"max_steps": steps, "limit_val_batches": 0, "default_root_dir": folder}
    trainer = quiet_trainer(devices=2, strategy=sharded(), **options)
    keep_checkpoints_whole(trainer)
    trainer.fit(Net(), Digits(image_size=8, batch_size=20), ckpt_path=ckpt_path)
    return trainer


def weights(trainer):
    """The whole matrix, on each rank."""
    return trainer.model.net[1].weight.full_tensor().detach().clone()


def names(path):
    """Of what lies in a folder."""
    return sorted(item.name for item in path.iterdir())


def main(folder):
    """Save over a folder, fail to save over it, resume from it."""
    target = folder / "last.ckpt"
    trainer = fit(folder, 2)
    trainer.save_checkpoint(target)
    (target / "of the first save").touch()
    trainer.strategy.barrier()
    trainer = fit(folder, 3, target)
    trainer.save_checkpoint(target)
    trainer.strategy.barrier()
    assert names(folder) == ["last.ckpt"]
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "checksums.json", "meta.pt"]
    assert names(target) == files, names(target)

    trainer.strategy.barrier()
    kept, write = weights(trainer), torch.save
    if trainer.global_rank == 1:  # a disk that is full on one of the machines
        torch.save = full_disk
    failed = fit(folder, 5, target)
    try:
        failed.save_checkpoint(target)
    except OSError as error:
        assert "last.ckpt' cannot be written: No space left on device. What had its name before" in str(error), error
    else:
        raise AssertionError("the full disk was not seen")
    torch.save = write
    failed.strategy.barrier()
    assert names(folder) == ["last.ckpt"]
    assert torch.equal(weights(fit(folder, 3, target)), kept)
    refuse_flipped_bits(failed, folder, target)
    if failed.global_rank == 0:
        (folder / "done").touch()
    end()


def refuse_flipped_bits(trainer, folder, target):
    """In a file that the other process reads, too, all refuse."""
    if trainer.global_rank == 0:
        data = bytearray((target / "__1_0.distcp").read_bytes())
        data[len(data) // 2] ^= 1
        (target / "__1_0.distcp").write_bytes(data)
    trainer.strategy.barrier()
    try:
        fit(folder, 5, target)
    except OSError as error:
        assert str(error).endswith("is damaged (the checksum of '__1_0.distcp' is wrong). Use an earlier one."), error
    else:
        raise AssertionError("the flipped bit was not seen")
    trainer.strategy.barrier()


def full_disk(*arguments, **options):
    """In torch.save's place."""
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
