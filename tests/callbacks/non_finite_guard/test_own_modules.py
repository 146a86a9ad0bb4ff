"""NonFiniteGuard beside this package's modules: one NaN pixel, one NaN weight."""

import re
from functools import partial

import pytest
import torch
import trainers
from lightning.pytorch import Callback

from lightning_plugins import EAE, CapsNet, DiffusionTeacher, Digits, NonFiniteGuard, Seq2SeqData, UniLMSeq2Seq

IMAGES = {"image_shape": (1, 8, 8), "num_classes": 10}
CONFIG = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG |= {"intermediate_size": 16, "max_position_embeddings": 24}
MODULES = {
    "CapsNet": lambda: CapsNet(**IMAGES, channels=8, kernel_size=3, num_types=2, decoder_hidden=(16,)),
    "EAE": lambda: EAE(**IMAGES, latent_dim=4, network="mlp", width=16, pictures_every_n_epochs=0),
    "DiffusionTeacher": lambda: DiffusionTeacher(
        block_out_channels=(8, 8), num_train_timesteps=100, pictures_every_n_epochs=0
    ),
}


@pytest.fixture(autouse=True)
def one_thread(clean_process):
    torch.set_num_threads(1)  # small tensors
    torch.manual_seed(0)


class OnePixel(Digits):
    """Digits with one NaN in step 2."""

    def __init__(self):
        super().__init__(image_size=8, batch_size=16, num_train=80)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training and self.trainer.global_step == 2:
            batch["image"][5, 0, 4, 4] = float("nan")
        return batch


fit = partial(trainers.fit, max_epochs=None, max_steps=5, num_sanity_val_steps=0, limit_val_batches=1)


class WeightsBefore(Callback):
    """The weights before the latest step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.weights = {name: param.detach().clone() for name, param in pl_module.named_parameters()}


@pytest.mark.parametrize("name", MODULES)
def test_one_nan_pixel(name):
    """The sentence has the sample's key; no weight has changed."""
    data = OnePixel()
    model, before = MODULES[name](), WeightsBefore()
    with pytest.raises(FloatingPointError) as raised:
        fit(model, data, NonFiniteGuard(), before)
    data.trainer.training = True
    loader = data.train_dataloader()
    (key,) = [keys[5] for index, keys in enumerate(loader.batch_sampler) if index == 2]
    lines = str(raised.value).splitlines()
    assert lines[0] == "NonFiniteGuard: in step 2 (epoch 0, batch 2, rank 0) the loss is not finite."
    assert "train/loss nan" in lines[1] and "not finite" in lines[2]
    assert lines[3].endswith(f"image is not finite in row 5, key {key}.") and "image (16, 1, 8, 8)" in lines[3]
    for name, value in before.weights.items():
        assert torch.equal(value, model.get_parameter(name)), name


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:NonFiniteGuard")
def test_one_nan_pixel_left_out(name):
    guard = NonFiniteGuard("skip")
    model = MODULES[name]()
    run = fit(model, OnePixel(), guard)
    assert guard.skipped == 1 and run.global_step == 5
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert run.callback_metrics["val/loss"].isfinite()


def test_a_nan_weight_and_windows_weighed_by_tokens(tmp_path):
    """UniLMSeq2Seq, whose accumulation GradientPenalty and the like must not read: the guard may."""
    pairs = [[f"a b {letter}", f"{letter} a"] for letter in "bcdefghijklm"]
    data = Seq2SeqData(pairs=pairs, val_size=2, vocab_size=30, max_source_length=8, max_target_length=8, batch_size=2)
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")

    class Spoilt(UniLMSeq2Seq):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 2:
                with torch.no_grad():
                    next(self.parameters())[1, 3] = float("nan")

    model = Spoilt(config=CONFIG, tokenizer=str(tmp_path / "tokenizer"), generation={"max_new_tokens": 2})
    with pytest.raises(FloatingPointError, match=r"in step 1 \(epoch 0, batch [23]") as raised:
        fit(model, data, NonFiniteGuard(), accumulate_grad_batches=2)
    assert re.search(r"Weights that are not finite now: \S*embeddings\S*weight\.", str(raised.value))
