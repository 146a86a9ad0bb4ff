"""Under torchrun: each module trained by the command line, sharded (FSDP2). ``train_shards.py FOLDER``.

``FOLDER/<case>/checkpoints/last.ckpt`` is the folder of shards, ``one.ckpt`` one file that the strategy has written at
the same moment, ``whole.ckpt`` one that was made of the folder; ``FOLDER/<case>-on`` went on from it.
"""

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from rank_script import end

from lightning_plugins.cli import main

BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 16, "max_position_embeddings": 32}
CAPSNET = ["--model.channels=4", "--model.kernel_size=3", "--model.num_types=1", "--model.decoder_hidden=[4]"]
EAE = ["--model.latent_dim=2", "--model.network=mlp", "--model.width=16", "--model.prior=mixture"]
UNILM = [f"--model.config={json.dumps(BERT)}", "--model.generate_every_n_epochs=0"]
DIGITS = ["--data=Digits", "--data.image_size=8", "--data.batch_size=20", "--data.num_train=120"]
TEXTS = ["--data=Seq2SeqData", "--data.train_file=pairs.tsv", "--data.vocab_size=40", "--data.batch_size=4"]
TEXTS += ["--data.max_source_length=12", "--data.max_target_length=8", "--data.test_file=pairs.tsv"]
TEXTS += ["--data.predict_file=pairs.tsv"]
TEACHER = ["--model.block_out_channels=[8]", "--model.layers_per_block=1", "--model.attention_levels=0"]
NO_PICTURES = "--model.pictures_every_n_epochs=0"
# the model and its data, as the command line takes them
CASES = {
    "capsnet": (["--model=CapsNet", *CAPSNET, NO_PICTURES], DIGITS),
    "eae": (["--model=EAE", *EAE, NO_PICTURES], DIGITS),
    "unilm": (["--model=UniLMSeq2Seq", *UNILM, "--model.generation.max_new_tokens=3"], TEXTS),
    "teacher": (["--model=DiffusionTeacher", *TEACHER, NO_PICTURES], DIGITS),
    "sid": (["--model=SiD", "--model.teacher=pipeline", "--model.num_pictures=0", "--model.updates_per_epoch=2"], []),
}
TWICE = ("unilm", "sid")  # of several groups of parameters, of several optimizers
SHARDED = ["--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.data_parallel_size=2"]
SHARDED += ["--trainer.strategy.tensor_parallel_size=1", "--trainer.devices=2"]
ONE = ["--trainer.devices=1"]


def fit(name, folder, *words, epochs=1):
    """The words of a command that trains a case into a folder."""
    model, data = CASES[name]
    saving = ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={folder}/checkpoints"]
    options = [f"--trainer.default_root_dir={folder}", f"--trainer.max_epochs={epochs}", "--trainer.accelerator=cpu"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.logger=false", "--trainer.limit_train_batches=2"]
    options += ["--trainer.log_every_n_steps=1"]
    saving += [] if name == "sid" else ["--trainer.callbacks.monitor=val/loss"]
    return ["fit", *model, *data, *options, *saving, "--trainer.callbacks.save_last=true", *words]


class OneFile(Callback):
    """Writes ``last.ckpt`` once more at the very end, and ``one.ckpt``, of which nothing is sharded."""

    def on_fit_end(self, trainer, pl_module):
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
        trainer.strategy._save_distributed_checkpoint = False
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "one.ckpt")
        trainer.strategy._save_distributed_checkpoint = True


def texts():
    """A file of pairs."""
    Path("pairs.tsv").write_text("source\ttarget\n" + "".join(f"{n} one\t{n}\n" for n in range(29)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    if os.environ["RANK"] == "0":
        texts()
    for case in CASES:
        main(fit(case, case, *SHARDED, "--trainer.callbacks+=train_shards.OneFile", "--test_after_fit=true"))
        if os.environ["RANK"] == "0":
            main(["consolidate", f"{case}/checkpoints/last.ckpt", f"{case}/whole.ckpt"])
            if case == "teacher":
                main(["export", "--ckpt_path=teacher/checkpoints/last.ckpt", "--output=pipeline"])
        torch.distributed.barrier()
    for case in ("capsnet", *TWICE):
        main(fit(case, f"{case}-on", *SHARDED, f"--ckpt_path={case}/checkpoints/last.ckpt", epochs=2))
    for case in TWICE:
        main(fit(case, f"{case}-on-from-file", *SHARDED, f"--ckpt_path={case}/whole.ckpt", epochs=2))
    end()
