"""SiD's training: the paper's two updates, what is counted, what a checkpoint holds, and how a run goes on from one."""

import copy
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_plugins.sid.module import SiD
from lightning_plugins.sid.teacher import load_teacher

BASE = {"batch_size": 5, "num_pictures": 0, "updates_per_epoch": 4, "lr": 1e-3, "fake_lr": 2e-3}


trainer = partial(quiet_trainer, max_steps=2)


def build(folder, **options):
    return SiD(teacher=str(folder), **(BASE | options))


def weights(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


class Watch(SiD):
    """Keeps the random numbers of its updates."""

    def _draw(self, n, turn):
        draws = super()._draw(n, turn)
        self.__dict__.setdefault("seen", []).append(draws)
        return draws


# One update against the paper's algorithm, written out.


class Plain:
    """DDPM's network as the mean of x_0, in EDM's scaling."""

    def __init__(self, network, scheduler):
        alphas = scheduler.alphas_cumprod.double()
        self.network, self.levels = network, ((1 - alphas) / alphas).sqrt()

    def __call__(self, x, sigma):
        t = (self.levels.log() - sigma.log().view(-1, 1)).abs().argmin(1)
        sigma = sigma.view(-1, 1, 1, 1)
        return x - sigma * self.network(x / (1 + sigma**2).sqrt(), t).sample

    def generate(self, z):
        start = self.levels[(self.levels.log() - torch.tensor(2.5).log()).abs().argmin()].expand(len(z))
        return self((1 + start[0] ** 2).sqrt() * z, start).clamp(-1, 1)  # the scheduler has clip_sample


def hand_written(folder, draws, alpha=1.2):
    """Algorithm 1 of the paper, two rounds of it."""
    loaded = load_teacher(folder)
    teacher = Plain(loaded.network.double(), loaded.scheduler)
    generator, fake = (Plain(copy.deepcopy(teacher.network).requires_grad_(True), loaded.scheduler) for _ in range(2))
    student = copy.deepcopy(generator.network.state_dict())
    adam = {"betas": (0.0, 0.999), "eps": 1e-8}
    generator_adam = torch.optim.Adam(generator.network.parameters(), lr=1e-3, **adam)
    fake_adam = torch.optim.Adam(fake.network.parameters(), lr=2e-3, **adam)
    seen = 0
    for first, second in zip(draws[::2], draws[1::2], strict=True):
        x_g = generator.generate(first.latent).detach()
        sigma = first.sigma.view(-1, 1, 1, 1)
        error = (fake(x_g + sigma * first.noise, first.sigma) - x_g).square().sum((1, 2, 3))
        ((first.sigma**2 + 0.25) / (first.sigma * 0.5) ** 2 * error).mean().backward()
        fake_adam.step()
        fake_adam.zero_grad()

        x_g = generator.generate(second.latent)
        x_t = x_g + second.sigma.view(-1, 1, 1, 1) * second.noise
        f_phi, f_psi = teacher(x_t, second.sigma), fake(x_t, second.sigma)
        delta = f_phi - f_psi
        omega = 1 / (x_g - f_phi).abs().mean((1, 2, 3), keepdim=True).detach()
        loss = (omega * delta * (f_phi - x_g - alpha * delta)).sum((1, 2, 3))
        (100 * loss.mean()).backward()
        generator_adam.step()
        generator_adam.zero_grad()
        fake_adam.zero_grad()

        beta = 0.5 ** (5 / min(500_000, 0.05 * seen)) if seen else 0.0
        for name, value in generator.network.state_dict().items():
            student[name] = beta * student[name] + (1 - beta) * value
        seen += 5
    found = {f"networks.generator.network.{name}": value for name, value in generator.network.state_dict().items()}
    found |= {f"networks.fake_score.network.{name}": value for name, value in fake.network.state_dict().items()}
    return found | {f"networks.student.network.{name}": value for name, value in student.items()}


def test_updates_equal_a_plain_loop(teacher_folder):
    """In double precision; in one part or in three unequal ones."""
    folder = teacher_folder("ddpm")
    for accumulate in (1, 3):
        module = Watch(teacher=str(folder), accumulate=accumulate, **BASE)
        trainer(precision="64-true").fit(module)
        draws = module.seen[1:]  # the first were for the check of the teacher
        expected = hand_written(folder, draws)
        start = load_teacher(folder).network.state_dict()
        for name, value in module.state_dict().items():
            torch.testing.assert_close(
                value, expected[name], rtol=0, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )
        moved = [(expected[f"networks.generator.network.{name}"] - value).abs().max() for name, value in start.items()]
        assert sum(bool(distance > 1e-4) for distance in moved) > 0.8 * len(moved)


def test_at_the_start_nothing_moves_the_generator(teacher_folder, tmp_path):
    """Fake score and teacher are equal then: difference, loss and gradient are exactly 0; with dropout too."""
    teacher = load_teacher(teacher_folder("ddpm"))
    type(teacher.network).from_config({**teacher.network.config, "dropout": 0.5}).save_pretrained(tmp_path / "unet")
    teacher.scheduler.save_pretrained(tmp_path / "scheduler")
    for folder in (tmp_path, *map(teacher_folder, ("ddpm", "labelled", "edm"))):
        module = build(folder, fake_lr=1e-30)
        run = trainer(max_steps=1)
        run.fit(module)
        assert all(part.training for part in module.networks.modules())
        network = load_teacher(folder).network
        for ours, theirs in zip(module.networks.generator.network.parameters(), network.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        for figure in ("generator_loss", "divergence"):
            assert run.callback_metrics[f"train/{figure}"] == 0
        assert run.callback_metrics["train/fake_loss"] > 0


class Hooks(SiD):
    """Counts gradients of parameters as they are computed, in each network and update."""

    def on_fit_start(self):
        super().on_fit_start()
        self.__dict__["counts"] = {}
        self.__dict__["before"] = weights(self.teacher.network)
        for part in ("generator", "fake_score"):
            for parameter in getattr(self.networks, part).parameters():
                parameter.register_hook(lambda gradient, part=part: self.count(part))

    def count(self, part):
        key = (self.update, part)
        self.counts[key] = self.counts.get(key, 0) + 1

    def _update(self, optimizer, *args):
        self.__dict__["update"] = "generator" if optimizer is self.optimizers()[0] else "fake_score"
        assert all(parameter.grad is None for parameter in self.parameters())
        return super()._update(optimizer, *args)

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        other = self.networks.fake_score if self.update == "generator" else self.networks.generator
        assert all(parameter.grad is None for parameter in other.parameters())
        assert all(parameter.grad is None for parameter in self.networks.student.parameters())
        assert all(parameter.grad is None for parameter in self.teacher.network.parameters())


def test_each_update_differentiates_one_network(teacher_folder):
    module = Hooks(teacher=str(teacher_folder("v")), fake_steps=2, **BASE)
    trainer().fit(module)
    tensors = len(list(module.networks.generator.parameters()))
    assert module.counts == {("fake_score", "fake_score"): 4 * tensors, ("generator", "generator"): 2 * tensors}
    after = weights(module.teacher.network)
    assert all(torch.equal(value, module.before[name]) for name, value in after.items())
    assert not any(parameter.requires_grad for parameter in module.teacher.network.parameters())
    assert not any(".teacher" in name or "_teacher" in name for name, _ in module.named_modules())
    assert not any(torch.equal(v, module.before[n]) for n, v in weights(module.networks.fake_score.network).items())


# Counting, checkpoints, going on.

LABELLED = {"decay_from": 0.5, "ema_halflife_images": 40.0, "fake_steps": 2}


@pytest.fixture(scope="module")
def run(teacher_folder, tmp_path_factory):
    """A class-conditional student after 7 updates, in epochs of 4, and the checkpoints on its way."""
    folder = tmp_path_factory.mktemp("sid")
    shutil.copytree(teacher_folder("labelled"), folder / "teacher")
    module = build(folder / "teacher", **LABELLED)
    saving = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)
    fit = trainer(saving, max_steps=7)
    fit.fit(module)
    fit.save_checkpoint(folder / "last.ckpt")
    sample = module.sample(6, generator=torch.Generator().manual_seed(1))
    return SimpleNamespace(folder=folder, module=module, trainer=fit, sample=sample)


def test_generator_updates_are_what_is_counted(run):
    """max_steps, global_step, epochs and cadences of checkpoints: not the fake score's, two of them each time."""
    assert run.trainer.global_step == run.module._updates == 7
    assert run.module.images == 35
    assert sorted(path.name for path in run.folder.glob("saved/*")) == ["step=3.ckpt", "step=6.ckpt"]
    adams = [optimizer.state_dict()["state"] for optimizer in run.trainer.optimizers]
    assert [int(adam[0]["step"]) for adam in adams] == [7, 14]
    assert run.trainer.callback_metrics["train/images"] == 35


def test_rates_fall_to_zero_over_the_last_share(teacher_folder):
    class Rates(SiD):
        def _log_step(self, n, logs):
            rates.append([group["lr"] for optimizer in self.optimizers() for group in optimizer.param_groups])

    for begin, shares in ((0.5, (1, 1, 0.5, 0)), (0.25, (1, 2 / 3, 1 / 3, 0))):
        rates = []
        trainer(max_steps=4).fit(Rates(teacher=str(teacher_folder("ddpm")), decay_from=begin, **BASE))
        assert rates == [pytest.approx([share * 1e-3, share * 2e-3]) for share in shares]


def test_betas_are_floats_and_settings_arrive(teacher_folder):
    """torch refuses an int among Adam's betas, which YAML makes of 0."""
    module = build(teacher_folder("ddpm"), betas=(0, 0.99), eps=1e-6)
    trainer(max_steps=1).fit(module)
    first, second = (optimizer.defaults for optimizer in module.trainer.optimizers)
    assert first["betas"] == (0.0, 0.99) and type(first["betas"][0]) is float
    assert (first["lr"], second["lr"], first["eps"]) == (1e-3, 2e-3, 1e-6)
    own = {"optimizer": lambda p: torch.optim.SGD(p, 0.1), "fake_optimizer": torch.optim.AdamW}
    given = build(teacher_folder("ddpm"), **own, lr=1e-5, fake_lr=1e-5)  # their defaults, which are not read
    trainer(max_steps=1).fit(given)
    assert [type(optimizer) for optimizer in given.trainer.optimizers] == [torch.optim.SGD, torch.optim.AdamW]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_resumed_equals_uninterrupted(run):
    """From the middle of the first epoch and of the second: weights, running mean, both Adams, rates, images."""
    for step in (3, 6):
        torch.manual_seed(step)  # the global random state does not matter
        module = build(run.folder / "teacher", **LABELLED)
        fit = trainer(max_steps=7)
        fit.fit(module, ckpt_path=run.folder / "saved" / f"step={step}.ckpt")
        for name, value in module.state_dict().items():
            assert torch.equal(value, run.module.state_dict()[name]), name
        assert (module.images, module._updates, fit.global_step) == (35, 7, 7)
        for ours, theirs in zip(fit.optimizers, run.trainer.optimizers, strict=True):
            assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
            for index, state in theirs.state_dict()["state"].items():
                for key, value in state.items():
                    assert torch.equal(ours.state_dict()["state"][index][key], value)
        assert torch.equal(module.sample(6, generator=torch.Generator().manual_seed(1)), run.sample)


def test_checkpoints_hold_three_networks_and_load_without_the_teacher(run, tmp_path):
    file = run.folder / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    parts = {name.split(".")[1] for name in checkpoint["state_dict"]}
    assert parts == {"generator", "fake_score", "student"}
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"networks"}
    size = sum(value.numel() for value in run.module.teacher.network.state_dict().values())
    assert sum(value.numel() for value in checkpoint["state_dict"].values()) == 3 * size
    away = tmp_path / "away"
    shutil.move(run.folder / "teacher", away)
    try:
        module = SiD.load_from_checkpoint(file, weights_only=True)
        assert (module.conditional, module.num_classes, module.images) == (True, 4, 35)
        assert torch.equal(module.sample(6, generator=torch.Generator().manual_seed(1)), run.sample)
        assert torch.equal(module.eval().sample(6, generator=torch.Generator().manual_seed(1)), run.sample)
        assert all(parameter.requires_grad for parameter in module.networks.generator.parameters())
        assert not any(parameter.requires_grad for parameter in module.networks.student.parameters())
        with pytest.raises(FileNotFoundError, match=r"teacher='.*teacher': there is no such folder"):
            module.teacher_sample(1)
    finally:
        shutil.move(away, run.folder / "teacher")
    assert module.teacher_sample(1, num_steps=1).shape == (1, 3, 8, 8)


def test_a_teacher_first_needed_for_a_picture_can_be_trained_with(run, tmp_path):
    """Lightning validates in inference mode, whose tensors let no gradient pass."""
    module = SiD.load_from_checkpoint(run.folder / "last.ckpt", num_pictures=1, teacher_steps=1)
    trainer(default_root_dir=tmp_path).validate(module, verbose=False)
    assert not any(parameter.is_inference() for parameter in module.teacher.network.parameters())
    trainer(max_steps=1).fit(module)


def test_another_teacher_is_refused(run, tmp_path):
    """By fit with a checkpoint, and by a module from a checkpoint when it first needs its teacher."""
    other = tmp_path / "other"
    shutil.copytree(run.folder / "teacher", other)
    network = load_teacher(other).network
    with torch.no_grad():
        next(network.parameters())[0] += 1e-6
    network.save_pretrained(other / "unet")
    match = (
        r"^teacher='.*other' is not the model that this checkpoint was trained with: its weights or config.*it was\.$"
    )
    with pytest.raises(ValueError, match=match):
        trainer().fit(build(other, **LABELLED), ckpt_path=run.folder / "last.ckpt")
    module = SiD.load_from_checkpoint(run.folder / "last.ckpt", teacher=str(other))
    with pytest.raises(ValueError, match=match):
        trainer().fit(module)
    moved = SiD.load_from_checkpoint(run.folder / "last.ckpt", teacher=str(run.folder / "teacher"))
    trainer(precision="64-true", max_steps=1).fit(moved)  # the same one, whatever the precision


def test_a_checkpoint_without_the_adapters_is_refused(run):
    """Whatever it lacks would be the teacher's, without a word."""
    with pytest.raises(ValueError, match=r"^lora_rank=2: the checkpoint does not hold this module's adapters"):
        SiD.load_from_checkpoint(run.folder / "last.ckpt", lora_rank=2)


def test_another_module_s_checkpoint_is_refused(run, tmp_path):
    checkpoint = torch.load(run.folder / "last.ckpt", weights_only=True)
    del checkpoint["sid"]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"^The checkpoint describes no networks of SiD: it is another module's\.$"):
        SiD.load_from_checkpoint(tmp_path / "other.ckpt")


# What is not finite.


class Spoilt(SiD):
    """Whose generator makes NaN of the second sample of a batch, in its first update or wherever ``where`` says."""

    where = "output"

    def _draw(self, n, turn):
        draws = super()._draw(n, turn)
        if self.where == "input" and self._updates == 1:
            draws.latent[1] = float("nan")
        return draws

    def configure_model(self):
        super().configure_model()
        generate = type(self.networks).generate

        def spoil(denoiser, noise, conditioning):
            images = generate(self.networks, denoiser, noise, conditioning)
            if self.where == "output" and self._updates == 1 and len(images) > 1:
                images = torch.where((torch.arange(len(images)) == 1).view(-1, 1, 1, 1), float("nan"), images)
            return images

        self.networks.generate = spoil


def test_samples_that_are_not_numbers_are_left_out_and_counted(teacher_folder):
    class Counts(Spoilt):
        def _log_step(self, n, logs):
            lost.append(float(n * logs["nonfinite"]))
            before.append(weights(self))
            super()._log_step(n, logs)

    for where in ("output", "input"):
        lost, before = [], []
        module = Counts(teacher=str(teacher_folder("ddpm")), **BASE)
        module.where = where
        trainer(max_steps=3).fit(module)
        assert lost == pytest.approx([0, 1, 0])
        first, second, third = before
        assert all(value.isfinite().all() for value in third.values())
        moved = {
            (part, step): any(not torch.equal(a[name], b[name]) for name in a if name.startswith(f"networks.{part}"))
            for part in ("generator", "fake_score")
            for step, (a, b) in {1: (first, second), 2: (second, third)}.items()
        }
        # NaN in the input reaches nearly all gradients of the generator: that update of its is mostly none
        assert all(moved.values())


def test_a_broken_teacher_is_refused(teacher_folder, tmp_path):
    pipeline = load_teacher(teacher_folder("ddpm"))
    with torch.no_grad():
        pipeline.network.conv_out.bias.fill_(float("nan"))
    pipeline.network.save_pretrained(tmp_path / "unet")
    pipeline.scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(
        ValueError, match=r"^teacher='.*' denoises noise to values that are not finite: is its file whole"
    ):
        trainer().fit(build(tmp_path))


# Bad arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma_init": 0.0}, "sigma_init=0.0 must be positive."),
        ({"lr": -1e-5}, "lr=-1e-05 must be positive."),
        ({"eps": float("nan")}, "eps=nan must be a finite number above 0."),
        ({"betas": (0.0,)}, "betas=(0.0,) must be two numbers, each a finite number in [0, 1)."),
        ({"betas": (0.0, 1.0)}, "betas=(0.0, 1.0) must be two numbers, each a finite number in [0, 1)."),
        ({"fake_steps": 0}, "fake_steps=0 must be 1 or more."),
        ({"accumulate": 6}, "accumulate=6 must not exceed batch_size=5."),
        ({"gradient_clip": 0}, "gradient_clip=0 must be positive."),
        ({"decay_from": 1.5}, "decay_from=1.5 must lie in [0, 1]."),
        ({"ema_ramp_up": 0.0}, "ema_ramp_up=0.0 must be positive."),  # it would keep no mean at all
        ({"loss": "dmd"}, "loss='dmd' must be one of sid, reverse_kl."),
        ({"weighting": None}, "weighting=None must be one of l1, none."),
        ({"noise_levels": "uniform"}, "noise_levels='uniform' must be one of edm, grid."),
        ({"fake_noise_levels": "uniform"}, "fake_noise_levels='uniform' must be one of edm, grid."),
        ({"t_min": 900}, "t_min=900 and t_max=800.0 must satisfy 0 <= t_min < t_max <= 1000 (thousandths of the sch"),
        ({"condition_dropout": -0.1}, "condition_dropout=-0.1 must lie in [0, 1]."),
        ({"adversarial": True, "guidance": 2.0}, "adversarial=True reads the fake score's network without guidance"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError) as error:
        build("nowhere", **arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("teacher", "arguments", "message"),
    [
        ("ddpm", {"sigma_init": 200.0}, "sigma_init=200.0 lies outside of the teacher's noise levels, 0.01"),
        ("edm", {"noise_levels": "grid"}, "noise_levels='grid' needs timesteps, and this teacher's levels have none"),
        ("ddpm", {"guidance": 2.0}, "guidance=2.0 needs a condition that stands for none, and this teacher has none"),
        ("labelled", {"condition_dropout": 0.1}, "condition_dropout=0.1 needs a condition that stands for none"),
        ("ddpm", {"adversarial": True}, "adversarial=True tells generated images from real ones: give data with imag"),
        ("dit", {"adversarial": True}, "adversarial=True tells generated images from real ones, but this teacher mak"),
        ("flow", {}, "teacher='"),
        ("sd", {}, "This teacher draws what a text says: give PromptData with a file of prompts as data."),
    ],
)
def test_arguments_that_do_not_fit_the_teacher(teacher_folder, teacher, arguments, message):
    with pytest.raises(ValueError) as error:
        trainer().fit(build(teacher_folder(teacher), **arguments))
    assert str(error.value).startswith(message)
    assert teacher != "flow" or "is told texts by its SD3Transformer2DModel, but has not the one text" in str(
        error.value
    )


def test_a_discriminator_of_classes_needs_labels(teacher_folder):
    """Drawn ones would not be those of the real images."""
    images = DataLoader([{"image": torch.rand(4, 3, 8, 8)}] * 2, batch_size=None)
    with pytest.raises(ValueError, match=r"^adversarial=True tells images of each class apart: give data with labels"):
        trainer().fit(build(teacher_folder("labelled"), adversarial=True), images)


def test_setups_that_cannot_train_are_refused(teacher_folder):
    folder = teacher_folder("ddpm")
    with pytest.raises(
        ValueError, match=r"^precision='bf16-true' keeps the weights in half precision.*'bf16-mixed'\.$"
    ):
        trainer(precision="bf16-true").fit(build(folder))
    for option in ({"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}):
        with pytest.raises(MisconfigurationException, match="manual optimization"):
            trainer(**option).fit(build(folder))
    with pytest.raises(TypeError, match="sigma"):
        build(folder, sigma=1.0)
    with pytest.raises(
        ValueError, match=r"^This SiD has no networks yet: they are built when a trainer starts; .*path"
    ):
        build(folder).sample(2)


def test_a_network_of_one_s_own(teacher_folder):
    """build_network is called for the generator and the fake score; frozen parts stay as they are in the student."""

    class Last(SiD):
        def build_network(self, network):
            network = super().build_network(network).requires_grad_(False)
            network.conv_out.requires_grad_(True)
            return network

    module = Last(teacher=str(teacher_folder("ddpm")), **BASE)
    trainer().fit(module)
    teacher, student = module.teacher.network.state_dict(), module.networks.student.network.state_dict()
    assert {name for name in teacher if not torch.equal(teacher[name], student[name])} == {
        "conv_out.weight",
        "conv_out.bias",
    }
    assert isinstance(module.networks.student.network, nn.Module)
