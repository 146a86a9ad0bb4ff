"""Train, validate, test and predict by each module on one or more processes, and save every rank's numbers.

``torchrun --nproc_per_node N same_numbers.py FOLDER TEACHER [CASE ...]``; the test also calls ``run`` for one process,
in its own. Training has the joined batches of one process, evaluation the same batch size on any number of processes.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from rank_script import end, full
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_plugins import EAE, CapsNet, Seq2SeqData, SiD, UniLMSeq2Seq
from lightning_plugins.core.distributed import close_process_group_at_exit
from lightning_plugins.data import ImageData, LabelledImages
from lightning_plugins.sid import DiffusionTeacher

GLOBAL_BATCH, EVALUATED = 8, 3
TRAINED, HELD_OUT = 16, 11  # the latter neither two nor four processes can share equally
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
SEED = 5


def sgd(parameters, lr=1e-3):
    """Unlike Adam it does not blow up the rounding of gradients that are nearly zero."""
    return torch.optim.SGD(parameters, lr=lr)


class Blobs(ImageData):
    """Pictures of 8 x 8 random bytes."""

    image_shape, num_classes, predict_split = (1, 8, 8), 3, "test"

    def read(self, split):
        count = TRAINED if split == "train" else HELD_OUT
        random = torch.Generator().manual_seed(len(split))
        pixels = torch.randint(256, (count, 1, 8, 8), generator=random, dtype=torch.uint8)
        return LabelledImages(pixels, torch.arange(count) % 3)


def texts(batch_size):
    """Words and the same backwards, 1 to 6 of them; the longest come first in evaluation."""
    random = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(TRAINED + HELD_OUT):
        length = int(torch.randint(1, 7, (), generator=random))
        words = [WORDS[i] for i in torch.randint(10, (length,), generator=random).tolist()]
        pairs.append([" ".join(words), " ".join(words[::-1])])
    limits = {"vocab_size": 60, "max_source_length": 16, "max_target_length": 16}
    return Seq2SeqData(pairs=pairs, val_size=HELD_OUT, batch_size=batch_size, **limits)


def bert(**options):
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,  # differs between processes
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.2,
    }
    settings = {"generation": {"max_new_tokens": 4}, "num_generate": 100, "optimizer": partial(sgd, lr=0.05)}
    return lambda teacher: UniLMSeq2Seq(config=config, **(settings | options))


def teacher_model(**options):
    settings = {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_levels": 0, "num_train_timesteps": 100}
    settings |= {"image_shape": (1, 8, 8), "pictures_every_n_epochs": 0, "optimizer": sgd}
    return lambda teacher: DiffusionTeacher(**(settings | options))


def sid(**options):
    settings = {"num_pictures": 0, "updates_per_epoch": 2, "batch_size": 4, "teacher_steps": 2}
    settings |= {"optimizer": partial(sgd, lr=1e-5), "fake_optimizer": partial(sgd, lr=1e-6)}
    return lambda teacher: SiD(teacher=str(teacher), **(settings | options))


def eae(**options):
    settings = {"image_shape": (1, 8, 8), "latent_dim": 3, "network": "mlp", "width": 16, "optimizer": sgd}
    return lambda teacher: EAE(pictures_every_n_epochs=0, **(settings | options))


def capsnet(**options):
    settings = {"image_shape": (1, 8, 8), "num_classes": 3, "pictures_every_n_epochs": 0, "optimizer": sgd}
    settings |= {"kernel_size": 3, "channels": 8, "num_types": 2, "decoder_hidden": (8, 8)}
    return lambda teacher: CapsNet(**(settings | options))


# name: what makes the module, the data
CASES = {
    "teacher": (teacher_model(), Blobs),
    "stock": (teacher_model(), Blobs),  # predicts from a torch DataLoader
    "teacher-classes": (teacher_model(conditional=True, num_classes=3), Blobs),
    "sid": (sid(fake_steps=2), Blobs),
    "masked": (bert(objective="masked"), texts),
    "kinds": (bert(mask={"seq2seq": 0.4, "l2r": 0.3, "r2l": 0.3}), texts),
    "pretraining": (bert(objective="masked", mask={"bidirectional": 0.5, "permutation": 0.5}), texts),
    "noisy": (bert(objective="pseudo", target_noise=0.5), texts),
    "eae": (eae(), Blobs),
    "vae": (eae(objective="vae"), Blobs),
    "sigreg": (eae(objective="sigreg"), Blobs),
    "capsnet": (capsnet(), Blobs),
}
WITH_PREDICTIONS = [name for name, (_, data) in CASES.items() if data is Blobs]
PRECISIONS = ("64-true", "32-true")


class Logged(Callback):
    """What is logged of each training batch."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *_):
        logged = trainer.callback_metrics
        speed = "train/tokens_per_second"
        kept = {name: value for name, value in logged.items() if name.startswith("train/") and name != speed}
        self.steps.append({name: float(value) for name, value in kept.items()})


def watch_draws(model):
    """A list that gets a number of torch's global ones, as dropout draws them, in each training batch."""
    name, drawn = "_fake_objective" if isinstance(model, SiD) else "loss", []
    original = getattr(model, name)

    def drawing(*arguments):
        if model.training:
            drawn.append(torch.rand(()))
        return original(*arguments)

    setattr(model, name, drawing)
    return drawn


def run(name, folder, teacher, processes=1, precision="64-true"):
    """Validate, test and predict, then train an epoch; write ``rank<r>.pt``."""
    make, data = CASES[name]
    seed_everything(SEED, verbose=False)
    model, logged = make(teacher), Logged()
    drawn, held_out = watch_draws(model), data(batch_size=EVALUATED)
    options = {"precision": precision, "devices": processes, "default_root_dir": folder}
    options["strategy"] = "auto" if processes == 1 else "ddp_find_unused_parameters_true"
    evaluator = quiet_trainer(**options)
    metrics, result = {}, {}
    if name != "sid":
        metrics |= evaluator.validate(model, held_out, verbose=False)[0]
    if isinstance(held_out, Blobs):
        metrics |= evaluator.test(model, held_out, verbose=False)[0] if name != "sid" else {}
        loader = {"dataloaders": stock_loader(held_out)} if name == "stock" else {"datamodule": held_out}
        result["predictions"] = evaluator.predict(model, **loader)
    fits = {"max_epochs": 1, "log_every_n_steps": 1, "limit_val_batches": 0}
    trainer = quiet_trainer(logged, **options, **fits)
    trainer.fit(model, data(batch_size=GLOBAL_BATCH // processes))
    weights = {key: full(value) for key, value in model.named_parameters()}
    result |= {"weights": weights, "train": logged.steps, "metrics": metrics, "drawn": torch.stack(drawn)}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(result, folder / f"rank{trainer.global_rank}.pt")


def stock_loader(data):
    """A torch ``DataLoader``, which Lightning shares among the processes."""
    pixels, labels = data.read("test")
    return DataLoader([(image.float() / 255, label) for image, label in zip(pixels, labels, strict=True)], EVALUATED)


if __name__ == "__main__":
    close_process_group_at_exit()
    torch.set_num_threads(1)
    root, teacher, *cases = sys.argv[1:]
    for case in cases or CASES:
        for precision in PRECISIONS:
            target = Path(root) / case / precision
            run(case, target, teacher, processes=int(os.environ["WORLD_SIZE"]), precision=precision)
    end()
