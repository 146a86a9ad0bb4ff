"""The command line resumes at the very batch, in any chain, whether the config asks for it or not."""

import pytest
import torch

from lightning_plugins.cli import main

WORDS = [
    "fit",
    "--model=CapsNet",
    "--model.channels=4",
    "--model.kernel_size=3",
    "--model.num_types=1",
    "--model.decoder_hidden=[4]",
    "--model.pictures_every_n_epochs=0",
    "--data=Digits",
    "--data.image_size=8",
    "--data.batch_size=200",  # 6 batches an epoch
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.dirpath=saved",
    "--trainer.callbacks.save_last=true",
]


def fit(*words):
    main([*WORDS, "--trainer.callbacks.every_n_train_steps=2", *words])
    return torch.load("saved/last.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_from_an_epochs_end_and_from_the_middle_of_the_next():
    """Plain Lightning trains the second epoch's first batches twice."""
    fit("--trainer.max_steps=6")
    second = fit("--trainer.max_steps=8", "--ckpt_path=saved/last.ckpt")
    assert second["global_step"] == 8
    last = fit("--trainer.max_epochs=2", "--ckpt_path=saved/last.ckpt")
    assert last["global_step"] == 12
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"] == 12
