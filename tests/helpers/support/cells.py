"""The models, the modes, and one run of a model in a mode.

Every run takes the same images in a step, however many processes share them, so that its weights should be those of one
process in the same precision.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import BERT, save_teacher
from trainers import quiet_trainer

from lightning_plugins import (
    EAE,
    AtomicCheckpointIO,
    CapsNet,
    DiffusionTeacher,
    Digits,
    RandomState,
    Seq2SeqData,
    SiD,
    UniLMSeq2Seq,
)

STEPS = 4
ROWS = 32  # images in a step of all processes
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def sgd(rate):
    """Unlike Adam it does not blow up the rounding of gradients that are nearly zero."""
    return partial(torch.optim.SGD, lr=rate)


def digits(rows, size=8):
    return Digits(image_size=size, batch_size=rows, num_train=ROWS * STEPS, seed=3)


def capsnet(root, rows):
    """Routing, decoder and labels."""
    size = {"channels": 8, "kernel_size": 3, "num_types": 2, "decoder_hidden": (16,)}
    model = CapsNet(image_shape=(1, 12, 12), optimizer=sgd(0.1), pictures_every_n_epochs=0, **size)
    return model, digits(rows, 12)


def eae(root, rows):
    """The entropy of all processes' codes."""
    size = {"latent_dim": 4, "network": "mlp", "width": 16}
    return EAE(image_shape=(1, 8, 8), optimizer=sgd(0.01), pictures_every_n_epochs=0, **size), digits(rows)


def unilm(root, rows, objective="pseudo", **options):
    """Text, of several lengths."""
    pairs = [[" ".join(WORDS[n % 10 :][: 1 + n % 4]), WORDS[n % 7]] for n in range(ROWS * STEPS)]
    lengths = {"max_source_length": 16, "max_target_length": 16, "vocab_size": 60}
    data = Seq2SeqData(pairs=pairs, val_size=0, batch_size=rows, length_grouping=False, **lengths)
    return UniLMSeq2Seq(config=BERT, objective=objective, optimizer=sgd(0.05), **options), data


def teacher(root, rows, **options):
    """Noise by the images' keys."""
    size = {"block_out_channels": (8, 16), "image_shape": (1, 8, 8)}
    return DiffusionTeacher(optimizer=sgd(0.05), pictures_every_n_epochs=0, **size, **options), digits(rows)


def sid(root, rows, rate=1e-5, **options):
    """Two networks in turn, without data."""
    rate = 1e-2 if "gradient_clip" in options else rate  # so that more moves than float32 rounds
    if not (root / "teacher").is_dir():
        save_teacher(root / "teacher")
    first, second = sgd(rate), sgd(rate)
    settings = {"batch_size": rows, "num_pictures": 0, "updates_per_epoch": STEPS}
    return SiD(str(root / "teacher"), optimizer=first, fake_optimizer=second, **settings, **options), None


PARTS: dict[str, Callable] = {
    "CapsNet": capsnet,
    "EAE": eae,
    "UniLMSeq2Seq": unilm,
    "UniLMSeq2Seq, masked": partial(unilm, objective="masked"),
    "DiffusionTeacher": teacher,
    "SiD": sid,
    "SiD, LoRA": partial(sid, lora_rank=2, rate=1e-4),
}
CHECKPOINTED = ("UniLMSeq2Seq", "UniLMSeq2Seq, masked", "DiffusionTeacher", "SiD", "SiD, LoRA")


@dataclass(frozen=True)
class Mode:
    """How a run is shared.

    Args:
        processes: how many.
        strategy: its name, or what makes it.
        options: of the Trainer; one process has them, too.
        launch: whether the Trainer starts the processes, not torchrun.
        begun_by: the processes of a run that stopped halfway and goes on in this mode.
        arguments: of the model alone in this mode.
        only: the models that have these arguments.
        tolerance: the largest distance to one process, in units of what training moved.
        refused: words of the sentence, by model, where it is.
    """

    processes: int = 2
    strategy: str | Callable = "ddp"
    options: dict = field(default_factory=dict)
    launch: bool = False
    begun_by: int | None = None
    arguments: dict = field(default_factory=dict)
    only: tuple[str, ...] = tuple(PARTS)
    tolerance: float = 1e-3
    refused: dict[str, str] = field(default_factory=dict)


def sharded(processes=2, tensor=1):
    """FSDP2."""
    return ModelParallelStrategy(data_parallel_size=processes // tensor, tensor_parallel_size=tensor)


SID_OPTIONS = {"accumulate_grad_batches": "accumulate", "gradient_clip_val": "gradient_clip"}
CLIPPED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
WHOLE = dict.fromkeys(PARTS, "no tensor parallelism")
HALF = dict.fromkeys(("DiffusionTeacher", "SiD", "SiD, LoRA"), "use 'bf16-mixed'")
MODES = {
    "DDP": Mode(),
    "DDP of four": Mode(processes=4),
    "accumulation, clipping": Mode(options=CLIPPED),
    "64-true": Mode(options={"precision": "64-true"}, tolerance=1e-9),
    "bf16-mixed": Mode(options={"precision": "bf16-mixed"}, tolerance=1.0),
    "bf16-true": Mode(options={"precision": "bf16-true"}, tolerance=1.0, refused=HALF),
    "activation checkpointing": Mode(arguments={"activation_checkpointing": True}, only=CHECKPOINTED),
    "FSDP2": Mode(strategy=sharded),
    "FSDP2, accumulation, clipping": Mode(strategy=sharded, options=CLIPPED),
    "FSDP2, bf16-mixed": Mode(strategy=sharded, options={"precision": "bf16-mixed"}, tolerance=1.0),
    "FSDP2, bf16-true": Mode(strategy=sharded, options={"precision": "bf16-true"}, tolerance=1.0, refused=HALF),
    "tensor parallelism": Mode(strategy=partial(sharded, tensor=2), refused=WHOLE),
    "2 to 1": Mode(processes=1, begun_by=2),
    "1 to 2": Mode(begun_by=1),
    "FSDP2 to 1": Mode(processes=1, strategy=sharded, begun_by=2),
    "ddp_spawn": Mode(strategy="ddp_spawn", launch=True),
    "ddp_fork": Mode(strategy="ddp_fork", launch=True),
    "ddp_notebook": Mode(strategy="ddp_notebook", launch=True),
}
CELLS = [(part, name) for name, mode in MODES.items() for part in mode.only]


class Start(Callback):
    """The weights that training began with."""

    def on_train_start(self, trainer, pl_module):
        self.weights = weights(pl_module)


def weights(module):
    """Copies of all parameters that are trained, whole."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in module.named_parameters()
        if value.requires_grad
    }


def train(part, mode, root, file, processes, steps=STEPS, ckpt_path=None):
    """One run; each of its processes writes what came of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    seed_everything(1, verbose=False)
    options, arguments = dict(mode.options), dict(mode.arguments) if processes == mode.processes else {}
    if part.startswith("SiD"):  # it optimizes by itself
        arguments |= {own: options.pop(name) for name, own in SID_OPTIONS.items() if name in options}
    model, data = PARTS[part](root, ROWS // processes, **arguments)
    strategy = mode.strategy() if callable(mode.strategy) else mode.strategy
    turns = 1
    if part.startswith("SiD"):
        turns = 2  # optimizers that step
        if isinstance(strategy, str):
            strategy += "_find_unused_parameters_true"  # without it is refused, and says so
    start = Start()
    trainer = quiet_trainer(
        start,
        RandomState(),
        plugins=[AtomicCheckpointIO()] if processes == 1 else [],  # reads folders, too
        default_root_dir=file.parent,  # for pictures
        devices=processes,
        strategy="auto" if processes == 1 else strategy,
        max_steps=turns * steps,
        max_epochs=-1,
        limit_val_batches=0,
        **options,
    )
    try:
        trainer.fit(model, data, ckpt_path=ckpt_path)
    except (ValueError, RuntimeError, NotImplementedError, MisconfigurationException) as error:
        result = {"refused": " ".join(str(error).split())}
    else:
        result = {"weights": weights(model), "start": getattr(start, "weights", None)}
        if mode.begun_by == processes and steps < STEPS:
            trainer.save_checkpoint(file.with_suffix(".ckpt"))
    torch.save(result, file.with_name(f"{file.name}-{trainer.global_rank}.pt"))


def reference(part, mode, root):
    """One process that does the same: the run of all modes with these options."""
    plain = Mode(processes=1, options=mode.options)
    file = folder_of(root, part) / "-".join(["one", *(f"{key}={value}" for key, value in mode.options.items())])
    if not file.with_name(f"{file.name}-0.pt").exists():
        train(part, plain, root, file, processes=1)
    return torch.load(file.with_name(f"{file.name}-0.pt"), weights_only=True)


def begin(part, name, root):
    """The first half of a run that goes on with another number of processes."""
    mode = MODES[name]
    train(part, mode, root, folder_of(root, part, name) / "begun", mode.begun_by, STEPS // 2)


def cell(part, name, root):
    """The run of a cell, in its processes."""
    mode = MODES[name]
    folder = folder_of(root, part, name)
    begun = None if mode.begun_by is None else folder / "begun.ckpt"
    train(part, mode, root, folder / "run", mode.processes, ckpt_path=begun)


def folder_of(root, part, *name):
    """The folder of a part, or of a cell."""
    return Path(root, *(word.replace(", ", "-").replace(" ", "_") for word in (part, *name)))


def distance(part, name, root):
    """The largest of all processes, in units of what training moved; or the sentence of a refusal."""
    mode = MODES[name]
    one = reference(part, mode, root)
    if "refused" in one:
        return one["refused"]
    moved = max((value - one["start"][key]).abs().max() for key, value in one["weights"].items())
    assert moved > 0
    files = sorted(folder_of(root, part, name).glob("run-*.pt"))
    assert len(files) == (1 if mode.launch else mode.processes)  # a Trainer that launches stays alone
    worst = 0.0
    for found in (torch.load(file, weights_only=True) for file in files):
        if "refused" in found:
            return found["refused"]
        assert found["weights"].keys() == one["weights"].keys()
        apart = max((found["weights"][key] - value).abs().max() for key, value in one["weights"].items())
        worst = max(worst, float(apart / moved))
    return worst
