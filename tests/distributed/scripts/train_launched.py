"""Train each part by a strategy on two processes, and save what the process that called ``fit`` has afterwards.

``python train_launched.py FOLDER STRATEGY PART...`` for strategies that start processes from Python; under torchrun
with ddp, whose rank zero writes. Digits and words are so few that a part takes a second.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from trainers import quiet_trainer

from lightning_plugins import (
    EAE,
    CapsNet,
    DiffusionTeacher,
    Digits,
    Flooding,
    GenerativeEvaluation,
    GradientPenalty,
    NonFiniteGuard,
    ODEDiagnostics,
    RandomState,
    SaveOnSigterm,
    Seq2SeqData,
    SiD,
    UniLMSeq2Seq,
)
from lightning_plugins.core.distributed import close_process_group_at_exit

SGD = partial(torch.optim.SGD, lr=0.05)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
PAIRS = [[f"{a} {b}", f"{b} {a}"] for a in WORDS for b in WORDS][:40]
IMAGES = {"image_shape": (1, 8, 8), "pictures_every_n_epochs": 0}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
    "initializer_range": 0.2,
}
TEACHER = {"block_out_channels": (8, 16), "attention_levels": 0, **IMAGES}
FLOAT64 = {"precision": "64-true"}


def digits():
    return Digits(image_size=8, batch_size=16, num_train=64, seed=3)


def capsnet():
    small = {"channels": 8, "kernel_size": 3, "num_types": 2, "decoder_hidden": (8,)}
    return CapsNet(**(IMAGES | small), optimizer=SGD), digits(), [Flooding(0.1), ODEDiagnostics()]


def eae():
    """Its codes are remembered in training, and a mixture is fitted to them at the end."""
    module = EAE(latent_dim=3, network="mlp", width=8, num_components=2, prior="mixture", **IMAGES)
    return module, digits(), [GenerativeEvaluation(num_samples=16, metrics=["birthday"])]


def teacher():
    return DiffusionTeacher(**TEACHER), digits(), [GradientPenalty(0.01)]


def unilm():
    """The tokenizer is the data's, trained in the other processes."""
    data = Seq2SeqData(pairs=PAIRS, val_size=8, vocab_size=60, max_source_length=16, max_target_length=16, batch_size=4)
    return UniLMSeq2Seq(config=BERT, optimizer=SGD, generation={"max_new_tokens": 6, "min_new_tokens": 4}), data, []


def sid():
    """Its teacher lies in the current folder."""
    return SiD("teacher", batch_size=2, updates_per_epoch=3, num_pictures=0), None, []


# part: module, data and callbacks, arguments of the Trainer
PARTS = {
    "capsnet": (capsnet, {}),
    "eae": (eae, FLOAT64),
    "teacher": (teacher, {}),
    "unilm": (unilm, FLOAT64),
    "sid": (sid, {}),
}


def run(part, folder, strategy):
    """Fit, and write what there is: weights, metrics, a checkpoint's path, samples; then evaluate."""
    seed_everything(1, verbose=False)
    make, options = PARTS[part]
    module, data, callbacks = make()
    launched = strategy != "ddp"
    if part == "sid":
        strategy += "_find_unused_parameters_true"
    callbacks += [RandomState(), SaveOnSigterm(), NonFiniteGuard(), ModelCheckpoint(folder / part, save_last=True)]
    trainer = quiet_trainer(*callbacks, devices=2, strategy=strategy, max_epochs=1, **options)
    trainer.fit(module, data)
    found = {
        "weights": dict(module.state_dict()),
        "metrics": {name: torch.as_tensor(value) for name, value in trainer.callback_metrics.items()},
        "best": str(trainer.checkpoint_callback.best_model_path),
        "record": record(module),
        "sample": sample(module),
    }
    if launched and part != "sid":  # whose validation measures nothing
        alone = quiet_trainer(**options).validate(module, data, verbose=False)
        found["validated"] = alone[0]
    if launched and part in ("unilm", "teacher", "sid"):
        module.export(folder / f"{part}-export")
    if launched and part == "unilm":
        trainer.save_checkpoint(folder / "unilm-saved.ckpt")  # without random states, which resuming says
        again = UniLMSeq2Seq.load_from_checkpoint(folder / "unilm-saved.ckpt", optimizer=SGD).double()
        found["again"] = sample(again)
    if trainer.is_global_zero:
        torch.save(found, folder / f"{part}.pt")


def record(module):
    """What a checkpoint says of a module beside its weights."""
    names = {"images": 0, "_updates": 0, "_steps": 0, "_results": {}}
    return {name: getattr(module, name, nothing) for name, nothing in names.items()}


def sample(module):
    """Something that the trained module makes."""
    module.eval()
    if isinstance(module, UniLMSeq2Seq):
        return module.generate_text(["one two", "eight seven"])
    if isinstance(module, CapsNet):
        return module(torch.linspace(0, 1, 64).view(1, 1, 8, 8)).detach()
    return module.sample(2, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    close_process_group_at_exit()
    torch.set_num_threads(1)
    root, name, *chosen = sys.argv[1:]
    for each in chosen or PARTS:
        run(each, Path(root), name)
