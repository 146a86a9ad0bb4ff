"""Train each part by a strategy on two processes, and save what the process that called ``fit`` has afterwards.

``python train_launched.py FOLDER STRATEGY PART...`` for strategies that start processes from Python, and under torchrun
with ddp, whose rank zero writes the file. Digits and words are so few that a part takes a second.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from trainers import quiet_trainer

from lightning_plugins import EAE, CapsNet, DiffusionTeacher, Digits, PromptData, Seq2SeqData, SiD, UniLMSeq2Seq
from lightning_plugins import callbacks as ours
from lightning_plugins.core.distributed import close_process_group_at_exit

SGD = partial(torch.optim.SGD, lr=0.05)
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
PAIRS = [[f"{a} {b}", f"{b} {a}"] for a in WORDS for b in WORDS][:40]
TEXTS = ["one two", "eight"]
IMAGES = {"image_shape": (1, 8, 8), "pictures_every_n_epochs": 0}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
TEACHER = {"block_out_channels": (8, 16), "attention_levels": 0}


def digits():
    return Digits(image_size=8, batch_size=16, num_train=64, seed=3)


def pairs():
    return Seq2SeqData(
        pairs=PAIRS, val_size=8, vocab_size=60, max_source_length=16, max_target_length=16, batch_size=4
    )


def capsnet():
    small = {"channels": 8, "kernel_size": 3, "num_types": 2, "decoder_hidden": (8,)}
    return CapsNet(**(IMAGES | small), optimizer=SGD), digits()


def eae():
    return EAE(latent_dim=3, network="mlp", width=8, num_components=2, prior="mixture", **IMAGES), digits()


def teacher():
    return DiffusionTeacher(**TEACHER, **IMAGES), digits()


def unilm():
    """The tokenizer is the data's, trained in the other processes."""
    return UniLMSeq2Seq(config=BERT, optimizer=SGD, generation={"min_new_tokens": 3, "max_new_tokens": 4}), pairs()


def sid():
    made = DiffusionTeacher(**TEACHER, **IMAGES)
    folder = Path("teacher")
    if not folder.exists():
        made.export(folder)
    return SiD(str(folder), batch_size=2, updates_per_epoch=3, num_pictures=0), None


# part: module and data, arguments of the Trainer
PARTS = {
    "capsnet": (capsnet, {}),
    "eae": (eae, {"precision": "64-true"}),
    "teacher": (teacher, {}),
    "unilm": (unilm, {"precision": "64-true"}),
    "sid": (sid, {}),
}
_ = PromptData


def run(part, folder, strategy):
    seed_everything(1, verbose=False)
    make, options = PARTS[part]
    module, data = make()
    if part == "sid":
        strategy += "_find_unused_parameters_true"
    saving = ModelCheckpoint(folder / part, save_last=True)
    guards = [ours.RandomState(), ours.SaveOnSigterm(), ours.NonFiniteGuard()]
    trainer = quiet_trainer(*guards, saving, devices=2, strategy=strategy, max_epochs=1, **options)
    trainer.fit(module, data)
    found = {
        "weights": dict(module.state_dict()),
        "metrics": {name: torch.as_tensor(value) for name, value in trainer.callback_metrics.items()},
        "best": str(trainer.checkpoint_callback.best_model_path),
        "sample": sample(module),
    }
    if trainer.is_global_zero:
        torch.save(found, folder / f"{part}.pt")
    if strategy != "ddp":
        tested = trainer.validate(module, data, verbose=False)
        alone = quiet_trainer(devices=1, **options).validate(module, data, verbose=False)
        torch.save([tested, alone], folder / f"{part}-tested.pt")


def sample(module):
    module.eval()
    if isinstance(module, UniLMSeq2Seq):
        return module.generate_text(TEXTS)
    if isinstance(module, CapsNet):
        return module(torch.linspace(0, 1, 64).view(1, 1, 8, 8)).detach()
    return module.sample(2, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    close_process_group_at_exit()
    torch.set_num_threads(1)
    root, name, *chosen = sys.argv[1:]
    root = Path(root).absolute()
    for each in chosen or PARTS:
        try:
            run(each, root, name)
        except Exception as error:
            import traceback
            traceback.print_exc()
            print(each, "FAILED", str(error)[-1500:])
