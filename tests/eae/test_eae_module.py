"""EAE as a LightningModule: samples, paths, priors, logs, pictures, checkpoints, subclasses, mistakes."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_plugins import EAE
from lightning_plugins.eae import (
    LatentPrior,
    conditional_knn_entropy,
    entropy_gap,
    knn_entropy,
    latent_diagnostics,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fitted(small, loader, trainer):
    """A run of two epochs, and its Trainer."""

    def fit(max_epochs=2, **arguments):
        model, run = small(**arguments), trainer(max_epochs=max_epochs)
        run.fit(model, loader(), loader())
        return model, run

    return fit


def given(*batches):
    return DataLoader(batches, batch_size=None)


def all_of(loader, key="image"):
    return torch.cat([batch[key] for batch in loader])


@pytest.mark.parametrize("objective", ["eae", "ae", "ae_bn", "rae_l2", "vae", "wae", "sigreg", "mmd"])
def test_every_objective_learns(small, loader, trainer, objective):
    model = small(objective=objective, weight=None if objective in ("ae", "ae_bn") else 0.1)
    run = trainer(max_epochs=10)
    run.fit(model, loader(), loader())
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    assert logged["val/reconstruction"] < 5.0  # 2.4 is the noise of the images, 8.0 a grey image's
    assert ("val/regularization" in logged) == (objective not in ("ae", "ae_bn"))
    assert ("train/entropy_gap" in logged) == (objective == "eae")
    assert model.sample(3, prior="mixture").shape == (3, 1, 8, 8)
    assert np.isfinite([*logged.values()]).all()


def test_logs_are_of_all_images(fitted, loader):
    """Names and values, from the model alone."""
    model, run = fitted(weight=0.3, k=[1, 2])
    batches = loader(7)
    (logged,) = run.validate(model, batches, verbose=False)
    with torch.no_grad():
        z, images = model.eval().encode(all_of(batches)), all_of(batches)
        errors = (model(images) - images).square().flatten(1).sum(1)
    diagnostics = latent_diagnostics(z, [1, 2])
    expected = {"reconstruction": errors.mean(), "regularization": -0.3 * diagnostics["entropy"], **diagnostics}
    expected["loss"] = expected["reconstruction"] + expected["regularization"]
    assert logged == {f"val/{name}": pytest.approx(value.item(), abs=1e-5) for name, value in expected.items()}
    for batch_size in (5, 48):  # however they come
        assert run.validate(model, loader(batch_size), verbose=False)[0] == pytest.approx(logged, abs=2e-5)
    assert run.test(model, batches, verbose=False)[0]["test/loss"] == pytest.approx(logged["val/loss"], abs=1e-5)


@pytest.mark.parametrize("objective", ["vae", "sigreg", "mmd"])
def test_evaluation_draws_the_same_each_time(small, loader, trainer, objective):
    """Under any seed, in any batches, at any step: losses of epochs and runs compare."""
    model, losses = small(objective=objective), []
    for size in 16, 5:
        torch.manual_seed(size)
        losses.append(trainer().validate(model, loader(size), verbose=False)[0]["val/loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_training_logs(small, loader, trainer, batch):
    """Warm-up from 0: no term in the first step, half the weight in the second of two."""
    model = small(weight=0.8, weight_warmup_steps=2, optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    run = trainer(max_steps=2)
    run.fit(model, given(batch, batch), given(batch))
    images = batch["image"]
    with torch.no_grad():
        z = model.train().encode(images)
        error = (model.decode(z) - images).square().flatten(1).sum(1).mean()
    gap = entropy_gap(z)
    assert run.callback_metrics["train/reconstruction"].item() == pytest.approx(error.item())
    assert run.callback_metrics["train/entropy_gap"].item() == pytest.approx(gap.item(), abs=1e-4)
    entropy = latent_diagnostics(z)["entropy"].item()
    assert run.callback_metrics["train/regularization"].item() == pytest.approx(-0.4 * entropy, abs=1e-5)
    assert run.callback_metrics["train/loss"].item() == pytest.approx(error.item() - 0.4 * entropy, abs=1e-5)
    assert model.current_weight() == 0.8
    assert model.eval().current_weight() == 0.8


def test_the_weight_stays_after_its_warm_up(small, loader, trainer):
    class Weights(EAE):
        def on_train_batch_start(self, batch, batch_idx):
            weights.append(self.current_weight())

    weights = []
    trainer(max_epochs=2).fit(small(Weights, weight=0.8, weight_warmup_steps=2), loader(), loader())
    assert weights == [0.0, 0.4, 0.8, 0.8, 0.8, 0.8]


def test_too_few_images_for_an_entropy(small, loader, trainer):
    with pytest.warns(UserWarning, match="1 val images are too few for an entropy: val/loss is not logged"):
        logged = trainer().validate(small(), loader(count=1), verbose=False)
    assert set(logged[0]) == {"val/reconstruction"}


def test_a_diverged_run_shows(small, loader, trainer):
    first, *others = loader()
    first["image"][3] = float("nan")
    (logged,) = trainer().validate(small(), given(first, *others), verbose=False)
    assert np.isnan(logged["val/reconstruction"]) and np.isnan(logged["val/loss"])


def test_codes_do_not_depend_on_the_batch_in_evaluation(fitted, batch):
    model, _ = fitted()
    images = batch["image"]
    model.eval()
    torch.testing.assert_close(torch.cat([model.encode(image[None]) for image in images]), model.encode(images))
    output = model.predict_step(batch, 0)
    assert set(output) == {"code", "reconstruction", "error"}
    expected = torch.stack([F.mse_loss(*pair) for pair in zip(output["reconstruction"], images, strict=True)])
    torch.testing.assert_close(output["error"], expected)
    assert torch.equal(output["code"], model.encode(images))
    assert torch.equal(output["reconstruction"], model.decode(output["code"]))
    assert torch.equal(model.reconstruct(images), output["reconstruction"])


def test_interpolations_end_at_the_reconstructions(fitted, batch):
    model, _ = fitted()
    a, b = batch["image"][:5], batch["image"][5:10]
    model.train()
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    for mode in ("linear", "slerp"):
        path = model.interpolate(a, b, 4, mode)
        assert path.shape == (5, 4, 1, 8, 8) and not path.requires_grad
        assert model.training and model.batch_norm.training
        model.eval()
        torch.testing.assert_close(path[:, 0], model(a).detach())
        torch.testing.assert_close(path[:, -1], model(b).detach())
        model.train()
    assert all(torch.equal(value, statistics[name]) for name, value in model.named_buffers())


def test_a_conditional_model_draws_the_class_it_is_told(small, loader, trainer, batch):
    model = small(conditional=True, weight=2.0)
    trainer(max_epochs=30).fit(model, loader(), loader())
    model.eval()
    labels = torch.arange(4).repeat_interleave(50)
    samples = model.sample(200, labels=labels, generator=seeded())
    blocks = samples.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((1, 3, 5)).flatten(1)  # of the four squares
    assert (blocks.argmax(1) == labels).float().mean() > 0.9
    mixed = model.sample(400, generator=seeded())
    blocks = mixed.unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((1, 3, 5)).flatten(1)
    assert (blocks.argmax(1).bincount(minlength=4) > 60).all()  # all classes alike if none is asked for
    output = model.predict_step(batch, 0)
    assert torch.equal(output["reconstruction"], model(batch["image"], batch["label"]))
    path = model.interpolate(batch["image"][:2], batch["image"][2:4], 3, labels=batch["label"][:2])
    torch.testing.assert_close(path[:, 0], model(batch["image"][:2], batch["label"][:2]).detach())


def test_a_conditional_models_entropy_is_that_within_classes(small, loader, trainer, batch):
    """In training and, whatever the batches, in evaluation; the gap that is logged stays that of all codes."""
    model = small(conditional=True, weight=0.5, k=[1, 2])
    codes = model.codes(batch["image"], batch["label"])
    found = model.loss(batch, codes)["regularization"]
    torch.testing.assert_close(found, -0.5 * conditional_knn_entropy(codes.all, batch["label"], [1, 2]))
    assert (found + 0.5 * knn_entropy(codes.all, [1, 2])).abs() > 1e-3
    run = trainer()
    run.fit(model, loader(), loader())
    assert run.callback_metrics["train/entropy_gap"].isfinite()
    batches = loader(7)
    (logged,) = run.validate(model, batches, verbose=False)
    with torch.no_grad():
        z = model.eval().encode(all_of(batches))
    expected = -0.5 * conditional_knn_entropy(z, all_of(batches, "label"), [1, 2])
    assert logged["val/regularization"] == pytest.approx(expected.item(), abs=1e-5)
    assert logged["val/entropy_gap"] == pytest.approx(entropy_gap(z, [1, 2]).item(), abs=1e-5)


@pytest.mark.parametrize(("objective", "weight"), [("eae", 1), ("eae", 0), ("vae", 1), ("ae", None), ("mmd", 1)])
def test_few_images_of_a_class(small, trainer, batch, objective, weight):
    """No class has two images: training with the entropy says so; evaluation logs what it always does."""
    model = small(conditional=True, num_classes=32, objective=objective, weight=weight)
    lonely = {"image": batch["image"], "label": torch.arange(32)}
    (logged,) = trainer().validate(model, given(lonely), verbose=False)
    assert {"val/reconstruction", "val/loss", "val/entropy_gap"} <= logged.keys()
    if (objective, weight) != ("eae", 1):
        trainer().fit(model, given(lonely), given(lonely))
        return
    with pytest.raises(ValueError, match="of 32 images of a batch only 0 have k=1 others of their class: enlarge"):
        trainer().fit(model, given(lonely), given(lonely))


def test_samples(fitted):
    model, _ = fitted(prior="gaussian")
    model.train()
    state, buffers = torch.get_rng_state(), {name: value.clone() for name, value in model.named_buffers()}
    for prior in ("normal", "gaussian", "mixture"):
        first, second = (model.sample(6, prior=prior, generator=seeded()) for _ in range(2))
        assert torch.equal(first, second) and first.dtype == torch.float32 and 0 <= first.min() <= first.max() <= 1
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    z = torch.randn(6, 4, generator=seeded())
    model.eval()
    torch.testing.assert_close(
        model.sample(6, prior="normal", temperature=0.5, generator=seeded()), model.decode(z / 2)
    )
    default = model.sample(6, generator=seeded())
    assert torch.equal(default, model.sample(6, prior="gaussian", generator=seeded()))
    assert model.sample(0).shape == (0, 1, 8, 8)


def test_a_part_in_evaluation_mode_stays_there(small, batch, loader):
    model = small(num_components=2)
    model.encoder.eval()
    before = [part.training for part in model.modules()]
    model.sample(2)
    model.interpolate(batch["image"][:1], batch["image"][1:2])
    model.fit_prior(loader())
    assert [part.training for part in model.modules()] == before and model.training


def test_the_prior_is_fitted_to_training_codes(fitted, loader, trainer):
    """At the end of training to those of it, by fit_prior to others, and again after more training."""
    model, _ = fitted()
    assert model.prior.is_fitted and model.prior.num_remembered == 96
    remembered = model.prior.memory[:96]
    torch.testing.assert_close(model.prior.mean, remembered.mean(0))
    for share in remembered.split(16):  # as batch norm leaves them
        assert share.mean(0).abs().max() < 1e-5
    others = loader(10, count=30, seed=5)
    model.train().fit_prior(others)
    with torch.no_grad():
        z = model.eval().encode(all_of(others))
    torch.testing.assert_close(model.prior.mean, z.mean(0))
    covariance = model.prior.factor @ model.prior.factor.mT
    torch.testing.assert_close(covariance, z.T.cov(), rtol=1e-4, atol=1e-5)
    drawn = model.sample(5, prior="mixture", generator=seeded())
    model.fit_prior([batch["image"] for batch in others])
    assert torch.equal(drawn, model.sample(5, prior="mixture", generator=seeded()))
    trainer(max_epochs=1).fit(model.train(), loader(), loader())
    assert model.prior.is_fitted
    torch.testing.assert_close(model.prior.mean, model.prior.memory[:144].mean(0))


def test_a_step_never_waits_for_the_prior(small, batch, trainer, monkeypatch):
    """Nothing of it is read as a number or fitted before training ends."""
    model, asked = small(), []

    class Spy(LatentPrior):
        def __getattribute__(self, name):
            asked.append(name)
            return super().__getattribute__(name)

    model.prior.__class__ = Spy
    monkeypatch.setattr(model, "on_train_end", asked.clear)
    model.on_train_batch_end = lambda *_: steps.append({*asked})
    steps = []
    trainer().fit(model, given(*[batch] * 3), given(batch))
    assert len(steps) == 3 and "remember" in steps[0]
    assert not {"is_fitted", "can_be_fitted", "num_remembered", "fit", "sample"} & set().union(*steps)


def test_any_checkpoint_draws_from_its_mixture(small, loader, trainer, tmp_path):
    """One that was written in the middle holds the codes, if not the fit; it loads safely, with plain arguments."""
    model = small(weight=0.3, k=[1, 2], prior="mixture", num_components=3)
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(keep, max_epochs=2)
    run.fit(model, loader(), loader())
    middle = EAE.load_from_checkpoint(tmp_path / "step=4.ckpt", weights_only=True)
    assert not middle.prior.is_fitted and middle.k == [1, 2] and middle.default_prior == "mixture"
    assert middle.sample(4).shape == (4, 1, 8, 8)
    torch.testing.assert_close(middle.prior.mean, middle.prior.memory[:64].mean(0))
    run.save_checkpoint(tmp_path / "end.ckpt")
    file = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert file["hyper_parameters"]["network"] == "mlp" and "optimizer" in file["hyper_parameters"]
    end = EAE.load_from_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    assert end.prior.is_fitted
    assert torch.equal(end.sample(5, generator=seeded()), model.sample(5, generator=seeded()))


def test_pictures(small, loader, trainer, tmp_path):
    """After every second epoch and after the test, and by validation alone."""
    model, run = small(pictures_every_n_epochs=2, prior="mixture"), trainer(max_epochs=3, logger=CSVLogger(tmp_path))
    run.fit(model, loader(), loader())
    run.test(model, loader(), verbose=False)
    written = {path.relative_to(run.log_dir).as_posix() for path in tmp_path.rglob("*.png")}
    names = ("reconstructions", "samples", "interpolations", "latents")
    assert written == {f"images/{stage}/{name}/{step:06d}.png" for name in names for stage, step in STEPS.items()}


STEPS = {"val": 6, "test": 9}


def test_pictures_before_any_training(small, loader, trainer, tmp_path):
    """There is no prior to be fitted yet, and an odd image has nothing to go to."""
    model = small(pictures_every_n_epochs=3, prior="mixture", conditional=True, network="rae", image_shape=(3, 32, 32))
    one = given({"image": torch.rand(1, 3, 32, 32), "label": torch.tensor([2])})
    with pytest.warns(UserWarning, match="too few"):
        trainer().validate(model, one, verbose=False)
    assert {path.parent.name for path in (tmp_path / "images/val").rglob("*.png")} == {"reconstructions", "samples"}


class Plain(EAE):
    """A user's own networks, with an argument, a parameter beside them and evaluation of its own."""

    def __init__(self, hidden: int = 5, **arguments):
        self.hidden = hidden
        super().__init__(**arguments)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def build_encoder(self):
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, self.hidden), torch.nn.Linear(self.hidden, 4)
        )

    def build_decoder(self):
        return torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Sigmoid(), torch.nn.Unflatten(1, (1, 8, 8)))

    def decode(self, z, label=None):
        return super().decode(self.scale * z, label)

    def validation_step(self, batch, batch_idx):
        self.log("val/largest", self.encode(batch["image"]).abs().max())

    def on_validation_epoch_end(self):
        pass


def test_a_subclass_trains_all_its_parameters(small, loader, trainer, tmp_path):
    model = small(Plain, hidden=3, objective="rae_l2", pictures_every_n_epochs=1)
    before = {name: value.clone() for name, value in model.named_parameters()}
    run = trainer()
    run.fit(model, loader(), loader())
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = Plain.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert again.hidden == 3 and torch.equal(again.sample(3, generator=seeded()), model.sample(3, generator=seeded()))


def test_own_optimizer_and_scheduler(small, loader, trainer):
    """Theirs are the rates and decays, for all parameters."""
    make = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.2)
    halve = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    model, run = small(optimizer=make, scheduler=halve), trainer(max_epochs=2)
    run.fit(model, loader(), loader())
    (group,) = run.optimizers[0].param_groups
    assert group["weight_decay"] == 0.2 and group["lr"] == pytest.approx(0.0025)
    assert len(group["params"]) == len([*model.parameters()])
    watch = functools.partial(ReduceLROnPlateau, monitor="val/loss", patience=0, threshold=1e3, factor=0.1)
    run = trainer(max_epochs=3)
    run.fit(small(lr=1.0, scheduler=watch), loader(), loader())
    assert run.optimizers[0].param_groups[0]["lr"] < 1.0
    run = trainer(max_epochs=3)
    run.fit(small(lr=1e-2, lr_decay=0.5), loader(), loader())
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1.25e-3)


def test_a_dry_run_leaves_nothing(small, loader, trainer, tmp_path):
    model = small(pictures_every_n_epochs=1, prior="gaussian")
    trainer(fast_dev_run=True).fit(model, loader(), loader())
    assert [*tmp_path.iterdir()] == []
    assert model.sample(2).shape == (2, 1, 8, 8)


IMAGES = torch.zeros(4, 1, 8, 8)
WRONG = {"image": torch.rand(16, 1, 8, 8), "label": torch.full((16,), 4)}


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda s: s(latent_dim=0), "latent_dim=0 must be 1 or more."),
        (lambda s: s(num_classes=0), "num_classes=0 must be 1 or more."),
        (lambda s: s(num_components=0), "num_components=0 must be 1 or more."),
        (lambda s: s(width=0), "width=0 must be 1 or more."),
        (lambda s: s(weight_warmup_steps=-1), "weight_warmup_steps=-1 must be 0 or more."),
        (lambda s: s(pictures_every_n_epochs=-1), "pictures_every_n_epochs=-1 must be 0 or more: 0 is for none."),
        (lambda s: s(k=0), "k=0 must be 1 or more, or several such numbers: the nearest other code is k=1."),
        (lambda s: s(k=[]), "k=[] must be a whole number of 1 or more, or several such numbers"),
        (lambda s: s(lr=0.0), "lr=0.0 must be positive."),
        (lambda s: s(lr=float("nan")), "lr=nan must be a finite number above 0."),
        (lambda s: s(lr_decay=1.1), "lr_decay=1.1 must lie in (0, 1]"),
        (lambda s: s(reconstruction="l2"), "reconstruction='l2' must be one of mse, bce, l1."),
        (lambda s: s(prior="gmm"), "prior='gmm' must be one of normal, gaussian, mixture."),
        (lambda s: s(objective="gan"), "objective='gan' must be one of"),
        (lambda s: s(network="resnet"), "network='resnet' must be one of mlp, rae."),
        (lambda s: s(image_shape=(8, 8)), "image_shape=(8, 8) must be (C, H, W), each a whole number of 1 or more."),
        (lambda s: s(network="rae"), "network='rae' takes images of 28 x 28, 32 x 32 or 64 x 64"),
        (lambda s: s().encode(torch.zeros(2, 1, 9, 9)), "built for image_shape=(1, 8, 8), got images (1, 9, 9)."),
        (lambda s: s().decode(torch.zeros(2, 5)), "Codes must be (B, latent_dim=4), got (2, 5)."),
        (lambda s: s(conditional=True).decode(torch.zeros(2, 5)), "Codes must be (B, latent_dim=4), got (2, 5)."),
        (lambda s: s(conditional=True)(IMAGES), "its decoder needs a class for each code, label=(B,) int64."),
        (lambda s: s(conditional=True).codes(IMAGES), "its entropy needs the class of each image, label=(B,) int64."),
        (lambda s: s()(IMAGES, torch.zeros(4, dtype=int)), "this EAE is not conditional: train one with conditional="),
        (lambda s: s().sample(2, labels=torch.zeros(2, dtype=int)), "labels were given, but this EAE is not"),
        (lambda s: s(conditional=True).sample(2, labels=torch.tensor([0, 4])), "run from 0 to 4: they must be 0 to 3."),
        (lambda s: s(conditional=True).sample(2, labels=torch.zeros(3, dtype=int)), "labels must be (2,) int64"),
        (lambda s: s(conditional=True).sample(2, labels=torch.zeros(2)), "labels must be (2,) int64"),
        (lambda s: s(conditional=True).training_step(WRONG, 0), "run from 4 to 4: they must be 0 to 3."),
        (lambda s: s().sample(2, prior="gmm"), "prior='gmm' must be one of normal, gaussian, mixture."),
        (lambda s: s().sample(2, temperature=-1.0), "temperature=-1.0 must be 0 or more."),
        (lambda s: s().sample(2, prior="mixture"), "has left 0: train longer, or call fit_prior(dataloader) first."),
        (lambda s: s().fit_prior([]), "num_components=10 needs 10 codes or more, got 0: give more codes"),
        (lambda s: s().interpolate(IMAGES, IMAGES[:1]), "Both ends need as many images, got 4 and 1."),
        (lambda s: s().interpolate(IMAGES, IMAGES, 1), "num_steps=1 must be 2 or more"),
        (lambda s: s().interpolate(IMAGES, IMAGES, labels=torch.zeros(4, dtype=int)), "this EAE is not conditional"),
        (lambda s: s().training_step({"image": IMAGES[:1]}, 0), "h has 1 row, and a variance needs two or more"),
        (lambda s: s(k=4).training_step({"image": torch.rand(4, 1, 8, 8)}, 0), "k=4 neighbours need more than 4 codes"),
    ],
)  # fmt: skip
def test_mistakes_in_one_sentence(small, use, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        use(small)
    assert message in str(error.value)
