"""Small runs of the command line for the five modules, forked from a process that has all imported, and their faults.

A fault is a callback of the run (``--trainer.callbacks+=fault_runs.Fault``): at a chosen batch it kills the process in
mid-step or in mid-save, signals it, kills a worker of its loader, or fills the disk. Only for processes of one thread
that have not run a backward pass themselves.
"""

import json
import multiprocessing
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from lightning.pytorch import Callback

from lightning_plugins.cli import (
    app,  # noqa: F401 (main imports it when it is wanted: here once for all children)
    main,
)
from lightning_plugins.core import checkpoint_io, replacing

BATCHES = 12  # three epochs of four
SAVE_EVERY = 2
LIMIT = 120  # seconds after which a run counts as hanging
DIGITS = ["--data=Digits", "--data.image_size=8", "--data.num_train=40", "--data.batch_size=10"]
BERT = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
PAIRS = ["--data=Seq2SeqData", "--data.train_file=pairs.tsv", "--data.val_size=4", "--data.vocab_size=60"]
MODULES = {  # with dropout or noise each, but for the first
    "CapsNet": [
        *DIGITS,
        *("--model.channels=4", "--model.kernel_size=3", "--model.num_types=1", "--model.decoder_hidden=[8]"),
        *("--data.shift=1", "--model.pictures_every_n_epochs=1"),
    ],
    "UniLMSeq2Seq": [
        *PAIRS,
        *("--data.max_source_length=12", "--data.max_target_length=8", "--data.batch_size=9"),
        *(f"--model.config={json.dumps(BERT)}", "--model.generate_every_n_epochs=0"),
    ],
    "EAE": [*DIGITS, "--model.network=mlp", "--model.latent_dim=4", "--model.width=8"],
    "SiD": [*DIGITS, "--model.teacher=teacher", "--model.num_pictures=4", "--model.batch_size=4"],
    "DiffusionTeacher": [*DIGITS, "--model.block_out_channels=[8,8]", "--model.pictures_every_n_epochs=2"],
}
TRAINER = ["--trainer.accelerator=cpu", "--trainer.max_epochs=3", "--trainer.log_every_n_steps=1"]
TRAINER += ["--trainer.logger=CSVLogger", "--trainer.logger.flush_logs_every_n_steps=1"]
TRAINER += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
TRAINER += ["--trainer.callbacks+=RandomState", "--trainer.callbacks+=ModelCheckpoint"]
TRAINER += ["--trainer.callbacks.save_last=true", f"--trainer.callbacks.every_n_train_steps={SAVE_EVERY}"]


def write_inputs() -> None:
    """What the modules read, in the current folder: pairs of texts, a teacher."""
    draw = random.Random(0)
    rows = [" ".join(draw.choices(["one", "two", "three", "four"], k=3)) for _ in range(40)]
    Path("pairs.tsv").write_text("source\ttarget\n" + "".join(f"{row}\t{row.upper()}\n" for row in rows))
    import diffusers

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(**sizes, **blocks, layers_per_block=1, norm_num_groups=4)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained("teacher")


def fit(module: str, root: str, *words: str) -> list[str]:
    """The words of a run that writes below ``root``."""
    return [
        *("fit", f"--model={module}", *MODULES[module], *TRAINER),
        *(f"--trainer.logger.save_dir={root}", f"--trainer.default_root_dir={root}", *words),
    ]


def fault(at: int, place: str) -> list[str]:
    """The words that bring a fault into a run."""
    words = ["--trainer.callbacks+=fault_runs.Fault", f"--trainer.callbacks.at={at}"]
    return [*words, f"--trainer.callbacks.place={place}"]


def kill(*arguments: object) -> None:
    """Without a word, as ``kill -9`` and the kernel out of memory do."""
    os.kill(os.getpid(), signal.SIGKILL)


class HalfASave:
    """In torch's place while a checkpoint is written: killed with half a file on the disk."""

    serialization = torch.serialization

    def save(self, checkpoint: dict, file: object) -> None:
        """Half of it."""
        file.write(b"PK half of a checkpoint")
        file.flush()
        kill()


def fill_disk(*arguments: object) -> None:
    """No file of this process can grow from now on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


PLACES = {
    "step": kill,
    "writing": lambda: setattr(checkpoint_io, "torch", HalfASave()),
    "flushing": lambda: setattr(replacing, "_flush", kill),
    "renaming": lambda: setattr(os, "replace", kill),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "worker": lambda: os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL),
    "checkpoint": fill_disk,
    "csv": fill_disk,
    "pictures": lambda: None,  # when they are drawn
}
KILLS = ("step", "writing", "flushing", "renaming")


class Fault(Callback):
    """Something happens in a batch.

    Args:
        at: the batch, counted from 1 in this process.
        place: one of ``PLACES``.
        rank: the process it happens to.
    """

    def __init__(self, at: int, place: str, rank: int = 0) -> None:
        self.at, self.place, self.rank, self.batches = at, place, rank, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        """Count."""
        self.batches += 1
        if self.batches == self.at and trainer.global_rank == self.rank:
            PLACES[self.place]()

    def on_validation_start(self, trainer, pl_module) -> None:
        """Pictures are drawn at the end of validation."""
        if self.place == "pictures" and self.batches >= self.at:
            fill_disk()


def forked(words: list[str], before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Run the command line in a child; its status, negative for a signal as subprocess has it, and what it said.

    Its words go into a pipe: a file would count against a full disk.

    Args:
        words: of the command line.
        before: called in the child.

    Raises:
        TimeoutError: it did not end in ``LIMIT`` seconds.
    """
    sys.stdout.flush()
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        _run(words, before)
    os.close(write)
    said, deadline = b"", time.monotonic() + LIMIT
    while select.select([read], [], [], max(deadline - time.monotonic(), 0))[0]:
        if not (data := os.read(read, 65536)):
            os.close(read)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.decode()
        said += data
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"{words} did not end in {LIMIT} s:\n{said[-3000:].decode()}")


def _run(words: list[str], before: Callable[[], None]) -> NoReturn:
    """The command line as a process has it."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        before()
        main(words)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def checkpoints(root: str | Path) -> list[Path]:
    """All of a root's, the newest last."""
    return sorted(Path(root).glob("lightning_logs/*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)


def last(folder: str | Path) -> dict:
    """The content of the last checkpoint in a folder."""
    return torch.load(Path(folder) / "last.ckpt", weights_only=True)


def same(one: object, two: object) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


def same_end(one: dict, two: dict) -> bool:
    """Weights, optimizers, schedulers and the number of steps."""
    return all(same(one[key], two[key]) for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"))
