"""Each module, stopped and resumed at random, ends with the bits of a run that was never stopped."""

import os

import pytest
import torch
from chains import Runs, quiet
from trainers import quiet_trainer

from lightning_plugins import EAE, CapsNet, DiffusionTeacher, Digits, Seq2SeqData, SiD, UniLMSeq2Seq

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("one_thread"),
]

DIGITS = {"image_size": 8, "batch_size": 16, "num_train": 80, "shift": 1}  # 5 batches an epoch
TEACHER = {"block_out_channels": (8, 8), "num_train_timesteps": 50, "pictures_every_n_epochs": 0}
WORDS = ["one", "two", "three", "four", "five", "six"]
ENCODER = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 24,
}


@pytest.fixture
def one_thread(clean_process):
    torch.set_num_threads(1)
    quiet()


def capsnet():
    small = {"channels": 4, "kernel_size": 3, "num_types": 1, "decoder_hidden": [8], "pictures_every_n_epochs": 0}
    return CapsNet(image_shape=(1, 8, 8), **small), Digits(**DIGITS)


def eae():
    return EAE(image_shape=(1, 8, 8), network="mlp", latent_dim=2, width=8, k=3, pictures_every_n_epochs=0), Digits(
        **DIGITS
    )


def teacher():
    return DiffusionTeacher(**TEACHER, conditional=True), Digits(**DIGITS)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    DiffusionTeacher(image_shape=(1, 8, 8), **TEACHER).export(folder)

    def make():
        options = {"batch_size": 4, "num_pictures": 0, "updates_per_epoch": 3, "lr": 1e-3, "fake_lr": 2e-3}
        return SiD(teacher=str(folder), decay_from=0.5, accumulate=2, **options), None

    return make


@pytest.fixture(scope="module")
def unilm(tmp_path_factory):
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={name: i for i, name in enumerate(names)}).save_pretrained(folder)
    pairs = [[" ".join(WORDS[: 1 + k % 5]), " ".join(WORDS[k % 5 :: -1])] for k in range(24)]
    data = {"pairs": pairs, "val_size": 4, "batch_size": 4, "max_source_length": 8, "max_target_length": 8}

    def make():
        model = UniLMSeq2Seq(config=ENCODER, tokenizer=str(folder), lr=1e-2, generation={"max_new_tokens": 2})
        return model, Seq2SeqData(tokenizer=str(folder), **data)

    return make


MAKERS = {"capsnet": capsnet, "eae": eae, "teacher": teacher}
SETTINGS = {
    "plain": {"val_check_interval": 0.5},
    "accumulation": {"val_check_interval": 2, "accumulate_grad_batches": 2},
    "64-true": {"precision": "64-true"},
    "16-mixed": {"check_val_every_n_epoch": 2, "precision": "bf16-mixed"},
    "16-true": {"precision": "bf16-true"},
}
KINDS = {
    "capsnet": SETTINGS,
    "unilm": SETTINGS,
    "eae": SETTINGS,
    "student": SETTINGS.keys() - {"accumulation", "16-true"},  # cuts its batches itself; refuses half precision
    "teacher": SETTINGS.keys() - {"16-true"},
}
CHAINS = int(os.environ.get("CHAINS", "0"))  # `make test-chains` runs more
DEFAULT = [("capsnet", "accumulation"), ("unilm", "accumulation"), ("eae", "16-true"), ("student", "64-true")]
DEFAULT += [("teacher", "plain")]
ALL = [(name, kind, seed) for name, kinds in KINDS.items() for kind in sorted(kinds) for seed in range(CHAINS)]


@pytest.mark.parametrize(("name", "kind", "seed"), ALL or [(name, kind, 0) for name, kind in DEFAULT])
def test_a_chain(request, tmp_path, name, kind, seed):
    make = MAKERS.get(name) or request.getfixturevalue(name)
    Runs(make, tmp_path, max_epochs=2, limit_val_batches=2, **SETTINGS[kind]).assert_chain(seed)


@pytest.mark.parametrize("name", KINDS)
def test_float64_is_read_as_float64(request, tmp_path, name):
    """By Lightning alone, without a callback of ours: weights do not pass through float32 on their way."""
    make = MAKERS.get(name) or request.getfixturevalue(name)
    settings = {"precision": "64-true", "limit_val_batches": 0, "max_steps": 2}
    module, data = make()
    trainer = quiet_trainer(**settings)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    expected = module.state_dict()
    assert any(value.dtype == torch.float64 and not torch.equal(value, value.float()) for value in expected.values())
    module, data = make()
    trainer = quiet_trainer(**settings)  # which has been made: nothing is left to do
    trainer.fit(module, data, ckpt_path=tmp_path / "saved.ckpt")
    assert trainer.global_step == 2
    for key, value in expected.items():
        assert torch.equal(module.state_dict()[key], value), key
