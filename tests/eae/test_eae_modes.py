"""Whole runs of EAE that must be equal, and the ways in which one may be run."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision

from lightning_plugins import EAE, Digits, Flooding, GradientPenalty, ODEDiagnostics
from lightning_plugins.eae import entropy_gap


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_without_weight_it_is_the_autoencoder_with_batch_norm(small, loader, trainer):
    """Bit for bit: weights, statistics, codes remembered, prior, logs."""
    runs = []
    for arguments in {"objective": "eae", "weight": 0.0, "k": 3, "weight_warmup_steps": 2}, {"objective": "ae_bn"}:
        model, run = small(**arguments), trainer(max_epochs=3)
        run.fit(model, loader(), loader())
        runs.append((state(model), run.callback_metrics["val/loss"], run.callback_metrics["val/reconstruction"]))
    assert_equal(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


class Disturb(Callback):
    """Draws from the global random state between steps."""

    def on_train_batch_start(self, *_):
        torch.rand(3)


@pytest.mark.parametrize("objective", ["vae", "mmd"])
def test_noise_is_the_steps_own(small, loader, trainer, objective):
    """Whatever else draws; another in each step, each accumulated batch and under each seed."""
    states = []
    for callbacks, seed in ([], 1), ([Disturb()], 1), ([], 2):
        model = small(objective=objective)
        torch.manual_seed(seed)
        trainer(*callbacks, max_epochs=1).fit(model, loader(), loader())
        states.append(state(model))
    assert_equal(states[1], states[0])
    assert not torch.equal(states[2]["encoder.1.weight"], states[0]["encoder.1.weight"])

    class Draws(EAE):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            drawn.append(torch.randn((), generator=self._generator()).item())
            return loss

    drawn = []
    trainer(max_epochs=2, accumulate_grad_batches=3).fit(small(Draws, objective=objective), loader(), loader())
    assert len({*drawn}) == len(drawn) == 6


def digits():
    """Three batches an epoch, whose order goes on where a checkpoint left it."""
    return Digits(image_size=8, batch_size=20, num_train=64, shift=1)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")  # ModelCheckpoint's own state
@pytest.mark.parametrize("objective", ["eae", "vae"])
def test_resumed_runs_equal_uninterrupted_ones(small, trainer, tmp_path, objective):
    """From the middle of an epoch and from its end: weights, statistics, codes remembered, prior."""
    arguments = {"objective": objective, "weight_warmup_steps": 5, "num_components": 3}
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = small(**arguments)
    run = trainer(keep, max_epochs=3)
    run.fit(whole, digits())
    assert run.global_step == 9
    for step in (3, 5):
        resumed = small(**arguments)
        again = trainer(max_epochs=3)
        again.fit(resumed, digits(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.global_step == 9
        assert_equal(state(resumed), state(whole))
        assert again.callback_metrics["val/loss"] == run.callback_metrics["val/loss"]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"weight": 0.3}, {"precision": "bf16-mixed"}),
        ({"objective": "vae", "reconstruction": "bce", "conditional": True}, {"precision": "bf16-mixed"}),
        ({}, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", 64.0))]}),
        ({"objective": "sigreg", "reconstruction": "l1"}, {"precision": "bf16-true"}),
        ({"conditional": True}, {"precision": "64-true"}),
        ({"conditional": True}, {"precision": "bf16-mixed"}),
        ({"objective": "vae"}, {"precision": "64-true"}),
        ({"objective": "mmd"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        ({"objective": "rae_l2"}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    ],
    ids=lambda value: "-".join(str(v) for v in value.values() if not isinstance(v, list)),
)
def test_modes(small, loader, trainer, batch, arguments, options):
    pictures = 2 if str(options.get("precision")).endswith("-true") else 0
    model = small(pictures_every_n_epochs=pictures, prior="gaussian", num_components=3, **arguments)
    run = trainer(max_epochs=2, **options)
    run.fit(model, loader(), loader())
    assert all(value.isfinite().all() for value in run.callback_metrics.values())
    assert all(p.isfinite().all() for p in model.parameters())
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(options.get("precision"), torch.float32)
    assert {p.dtype for p in model.parameters()} == {dtype}
    (output, *_) = run.predict(model, loader())
    assert output["reconstruction"].shape == (16, 1, 8, 8)
    labels = batch["label"][:2] if model.conditional else None
    assert model.interpolate(batch["image"][:2], batch["image"][2:4], 3, labels=labels).dtype == torch.float32
    for prior in ("normal", "mixture"):
        assert model.sample(4, prior=prior).dtype == torch.float32
    model.fit_prior(loader())


def test_half_precision_counts_all_images(small, loader, trainer):
    """A count in bfloat16 would end at 256."""
    logged = [
        trainer(precision="bf16-true").validate(small(), loader(size, 400), verbose=False)[0] for size in (1, 400)
    ]
    assert logged[0]["val/reconstruction"] == pytest.approx(logged[1]["val/reconstruction"], rel=1e-3)
    assert logged[0]["val/entropy"] == pytest.approx(logged[1]["val/entropy"], abs=0.05)


def test_sync_batchnorm_leaves_the_codes_norm_alone(small):
    model = small(network="rae", image_shape=(1, 32, 32), width=1)
    before = [type(part).__name__ for part in model.modules()]
    synced = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert "BatchNorm2d" in before
    assert [type(part).__name__ for part in synced.modules()] == [
        n.replace("BatchNorm2d", "SyncBatchNorm") for n in before
    ]


@pytest.mark.parametrize("objective", ["eae", "vae"])
def test_compiled_networks_train_alike(small, loader, trainer, objective):
    states = []
    for backend in None, "aot_eager":
        model = small(objective=objective)
        if backend:
            model.encoder.compile(backend=backend)
            model.decoder.compile(backend=backend)
        trainer().fit(model, loader(), loader())
        states.append(state(model))
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, between graphs
# torch 2.8 about torch.Generator, where it breaks the graph
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin")
def test_a_compiled_loss_is_the_loss(small, batch):
    """With the slices of one step's own generator."""
    model, gradients = small(objective="sigreg"), []
    for loss in model.loss, torch.compile(model.loss, backend="aot_eager"):
        model.zero_grad()
        sum(loss(batch).values()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_flooding(small, loader, trainer):
    """Around a level above what is reached, the loss stays there."""
    losses = []
    for level in (None, 7.0):
        model = small(objective="ae_bn")
        run = trainer(*([] if level is None else [Flooding(level)]), max_epochs=15)
        run.fit(model, loader(), loader())
        losses.append(run.callback_metrics["train/reconstruction"].item())
    assert losses[0] < 6.0 < losses[1] < 8.0


@pytest.mark.parametrize("objective", ["eae", "vae"])
@pytest.mark.filterwarnings("ignore:GradientPenalty. finite differences do not resolve")  # neighbours change
def test_gradient_penalty(small, loader, trainer, objective):
    """Replayed steps leave no trace: the codes remembered are each step's once, and no weight changes nothing."""
    states = []
    for callbacks in [], [GradientPenalty(0.0)], [GradientPenalty(1e-3)]:
        model = small(objective=objective)
        trainer(*callbacks).fit(model, loader(), loader())
        assert model.prior.num_remembered == 48
        states.append(state(model))
    assert_equal(states[1], states[0])
    assert not torch.equal(states[2]["encoder.1.weight"], states[0]["encoder.1.weight"])


def test_ode_diagnostics(small, loader, trainer):
    model, run = small(), trainer(ODEDiagnostics(every_n_steps=2), max_epochs=2)
    run.fit(model, loader(), loader())
    assert any(name.startswith("ode/") for name in run.callback_metrics)
    assert model.prior.num_remembered == 96


@pytest.mark.slow
def test_entropy_makes_the_codes_gaussian(trainer):
    """Real digits, eight dimensions: within 1.5 nats of a Gaussian's entropy, and far below without the term."""
    gaps = {}
    for weight in (0.3, 0.0):
        torch.manual_seed(0)
        data = Digits(image_size=8, batch_size=256)
        model = EAE((1, 8, 8), latent_dim=8, network="mlp", width=64, weight=weight, lr=5e-3, pictures_every_n_epochs=0)
        run = trainer(max_epochs=60, limit_val_batches=0)
        run.fit(model, data)
        with torch.no_grad():
            images = torch.cat([batch["image"] for batch in data.train_dataloader()])
            gaps[weight] = entropy_gap(model.eval().encode(images)).item()
    assert abs(gaps[0.3]) < 1.5 and gaps[0.0] < -2.5
