"""Each module, stopped and resumed at random, ends with the bits of a run that was never stopped."""

import pytest
import torch
from chains import Runs

from lightning_plugins import EAE, CapsNet, DiffusionTeacher, Digits, Seq2SeqData, SiD, UniLMSeq2Seq

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

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
        options = {"batch_size": 4, "num_pictures": 0, "updates_per_epoch": 4, "lr": 1e-3, "fake_lr": 2e-3}
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


@pytest.fixture
def make(request):
    local = {"capsnet": capsnet, "eae": eae, "teacher": teacher}
    return local.get(request.param) or request.getfixturevalue(request.param)


NAMES = ["capsnet", "unilm", "eae", "student", "teacher"]
SETTINGS = [
    {},
    {"val_check_interval": 2, "accumulate_grad_batches": 2},
    {"val_check_interval": 0.5, "precision": "64-true"},
    {"check_val_every_n_epoch": 2, "precision": "bf16-mixed"},
]


def settings_of(name, index):
    settings = SETTINGS[index]
    if name == "student":  # cuts its batches itself
        settings = {key: value for key, value in settings.items() if key != "accumulate_grad_batches"}
    return settings


@pytest.mark.parametrize(("make", "name"), [(name, name) for name in NAMES], indirect=["make"], ids=NAMES)
@pytest.mark.parametrize("index", range(len(SETTINGS)))
def test_a_chain(tmp_path, make, name, index):
    Runs(make, tmp_path, **settings_of(name, index)).assert_chain(index)
