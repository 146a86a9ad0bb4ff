"""SiDA against the authors' formulas written out: the adversarial term's weight, its logits, and what waits."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from trainers import quiet_trainer

from lightning_plugins.data.digits import Digits
from lightning_plugins.sid.adversarial import encoder_logits
from lightning_plugins.sid.module import SiD
from lightning_plugins.sid.objectives import Distillation, Draws
from lightning_plugins.sid.teacher import load_teacher

SIZES = [(3, 8, 8), (1, 4, 6)]
AT_ONCE = {"generator_after_images": 0, "adversarial_after_images": 0, "fake_clip_value": 0}


# The formulas, in double precision.


class Score(nn.Module):
    """A denoiser whose feature maps have half an image's height and width."""

    def __init__(self, channels, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(channels, 5, 3, stride=2, padding=1)
            self.last = nn.ConvTranspose2d(5, channels, 2, stride=2)
        self.double()

    def forward(self, x, sigma):
        self.middle = torch.tanh(self.first(x / (1 + sigma.view(-1, 1, 1, 1))))
        return self.last(self.middle)

    def logits(self):
        return self.middle.mean(1)


def drawn(shape, n=3):
    random = torch.Generator().manual_seed(0)
    images, real, latent, noise = torch.randn(4, n, *shape, generator=random, dtype=torch.float64)
    sigma = torch.rand(n, generator=random, dtype=torch.float64) + 0.5
    return images, real, Draws(latent, noise, sigma, torch.zeros(n, dtype=torch.bool))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_generators_terms_are_both_sums_over_an_image(shape, seed):
    """lsg = 100 times a sum, and lsg_gan = 0.01 times C H W times a mean, half and half: for each sample by itself.

    A teacher of the fake score's seed agrees with it, so that nothing but the adversarial term is left.
    """
    images, _, draws = drawn(shape)
    teacher, fake = Score(shape[0], seed), Score(shape[0], 2)
    made = images.clone().requires_grad_()
    terms = Distillation(alpha=1.0).generator_terms(lambda z: made, teacher, fake, draws, fake.logits)
    (found,) = torch.autograd.grad(terms.objective.sum(), made)
    C, H, W = shape
    for i in range(len(images)):
        y, sigma = images[i : i + 1].clone().requires_grad_(), draws.sigma[i : i + 1]
        y_t = y + sigma.view(-1, 1, 1, 1) * draws.noise[i : i + 1]
        y_real, y_fake = teacher(y_t, sigma), fake(y_t, sigma)
        y_D = fake.logits()
        factor = (y - y_real).detach().abs().mean((1, 2, 3), keepdim=True)
        loss = (y_real - y_fake) * ((y_real - y) - 1.0 * (y_real - y_fake)) / factor
        gan = binary_cross_entropy_with_logits(y_D.clamp(-10, 10), torch.ones_like(y_D)) / factor
        gan = gan.mean((1, 2, 3), keepdim=True) * C * H * W
        (expected,) = torch.autograd.grad(0.5 * 100 * loss.sum() + 0.5 * 0.01 * gan.sum(), y)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_fake_scores_second_term_is_a_mean(shape):
    """lsd = 1 times a mean over logits, beside a sum over the image: the authors have no C H W here."""
    images, real, draws = drawn(shape)
    fake = Score(shape[0], 2)
    loss = Distillation(alpha=1.0).fake_score_loss(lambda z: images, fake, draws, real, fake.logits)
    found = torch.autograd.grad(loss.sum(), [*fake.first.parameters()])
    expected = [torch.zeros_like(parameter) for parameter in fake.first.parameters()]
    for i in range(len(images)):
        y, y_0, noise, sigma = (v[i : i + 1] for v in (images, real, draws.noise, draws.sigma))
        level = sigma.view(-1, 1, 1, 1)
        weight = (level**2 + 0.5**2) / (level * 0.5) ** 2
        y_fake = fake(y + level * noise, sigma)
        of_fake = fake.logits()
        fake(y_0 + level * noise, sigma)
        of_real = fake.logits()
        score = weight * (y_fake - y) ** 2
        entropy = binary_cross_entropy_with_logits(of_real, torch.ones_like(of_real))
        entropy = entropy + binary_cross_entropy_with_logits(of_fake, torch.zeros_like(of_fake))
        total = score.sum() + (weight * entropy / 2).sum()
        torch.testing.assert_close(loss[i], total.detach(), rtol=1e-10, atol=0, check_dtype=True)
        for sums, gradient in zip(expected, torch.autograd.grad(total, [*fake.first.parameters()]), strict=True):
            sums += gradient
    torch.testing.assert_close([*found], expected, rtol=1e-10, atol=1e-12)


def test_logits_are_the_encoders(teacher_folder):
    """Of the last block on the way down, before the middle block, whose weights they do not know."""
    network = load_teacher(teacher_folder("ddpm")).network
    x, last = torch.randn(2, 1, 8, 8), []
    network.down_blocks[-1].register_forward_hook(lambda module, inputs, output: last.append(output[0]))
    with encoder_logits(network) as logits:
        network(x, 3)
        network(-x, 3)
        before = logits()
        assert torch.equal(before, last[1].mean(1))
        for parameter in network.mid_block.parameters():
            parameter.data.mul_(3).add_(1)
        network(-x, 3)
        assert torch.equal(logits(), before)
    assert not network.mid_block._forward_pre_hooks and not network.mid_block._forward_hooks


# The schedule, in images.


def build(folder, kind=SiD, **options):
    settings = {"adversarial": True, "alpha": 1.0, "num_pictures": 0, "lr": 1e-3, "fake_lr": 1e-3, **AT_ONCE}
    return kind(teacher=str(folder), **(settings | options))


def fit(module, *callbacks, steps=4, ckpt_path=None, **options):
    run = quiet_trainer(*callbacks, max_steps=steps, limit_val_batches=0, **options)
    run.fit(module, Digits(8, batch_size=8), ckpt_path=ckpt_path)
    assert run.global_step == module._updates == steps
    return run


class Watch(SiD):
    """Keeps the generator's first weights after each step, and the gradients that its optimizers are given."""

    def on_fit_start(self):
        super().on_fit_start()
        self.__dict__.update(weights=[self._first()], gradients=[])

    def _first(self):
        return [parameter.detach().clone() for parameter in self.networks.generator.parameters()]

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])

    def on_train_batch_end(self, *_):
        self.weights.append(self._first())

    def moved(self):
        """In which steps the generator moved."""
        return [
            any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for before, after in zip(self.weights[:-1], self.weights[1:], strict=True)
        ]


def adam_steps(run):
    """Updates that each of the two optimizers has made."""
    return [int(optimizer.state_dict()["state"].get(0, {"step": 0})["step"]) for optimizer in run.optimizers]


def test_the_generator_waits(teacher_folder):
    """For 16 images, two batches: the fake score trains, and Adam does not count what the generator has not done."""
    module = build(teacher_folder("ddpm"), Watch, generator_after_images=16)
    run = fit(module)
    assert module.moved() == [False, False, True, True]
    assert adam_steps(run) == [2, 4]
    assert run.callback_metrics["train/divergence"] > 0


def test_a_waiting_generator_s_first_step_is_adams_first(teacher_folder):
    """lr times the gradient's sign: the gradients that it did not take have left nothing behind."""
    module = build(teacher_folder("ddpm"), Watch, generator_after_images=16)
    fit(module, steps=3, precision="64-true")
    for before, after, gradient in zip(module.weights[2], module.weights[3], module.gradients[-1], strict=True):
        step = -1e-3 * gradient / (gradient.abs() + 1e-8)  # Adam's, of one gradient
        torch.testing.assert_close(after - before, step, rtol=1e-6, atol=1e-12)


def test_the_adversarial_term_joins_later(teacher_folder):
    """Fake score and teacher agree all the time, so that nothing but that term moves the generator."""
    module = build(teacher_folder("ddpm"), Watch, fake_lr=1e-30, adversarial_after_images=16)
    fit(module)
    assert module.moved() == [False, False, True, True]


class Apart(Watch):
    """Whose generator and fake score are not the teacher."""

    def build_network(self, network):
        network = super().build_network(network)
        random = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=random).to(parameter)
        return network


def test_before_it_joins_the_loss_is_the_distillations_whole(teacher_folder):
    """Not the half that it is later; Adam would hide that."""
    options = ({"adversarial_after_images": 8}, {"adversarial": False})
    modules = [build(teacher_folder("ddpm"), Apart, fake_lr=1e-30, **given) for given in options]
    for module in modules:
        fit(module, steps=2)
    waiting, plain = (module.gradients[1] for module in modules)
    assert any(gradient.abs().max() > 0 for gradient in plain)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(waiting, plain, strict=True))


def test_the_fake_scores_gradient_is_clipped_by_value(teacher_folder):
    """Each entry to [-1, 1] by default; the generator's is not."""
    found = {}
    for limit in (None, 0, 0.5):
        module = build(teacher_folder("ddpm"), Apart, fake_clip_value=limit)
        fit(module, steps=1)
        found[limit] = module.gradients
    assert max(gradient.abs().max() for gradient in found[0][0]) > 1.5
    for limit, size in ((None, 1.0), (0.5, 0.5)):
        for ours, whole in zip(found[limit][0], found[0][0], strict=True):
            assert torch.equal(ours, whole.clamp(-size, size))
    assert max(gradient.abs().max() for gradient in found[None][1]) > 1.5


def test_the_authors_settings_are_the_defaults(teacher_folder):
    folder = str(teacher_folder("ddpm"))
    module = SiD(folder, adversarial=True, alpha=1.0)
    found = (module.generator_after_images, module.adversarial_after_images, module.fake_clip_value)
    assert found == (100_000, 200_000, 1.0)
    plain = SiD(folder)
    assert (plain.generator_after_images, plain.adversarial_after_images, plain.fake_clip_value) == (0, 0, 0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_going_on_across_the_thresholds_is_exact(teacher_folder, tmp_path):
    """From before the generator's first update, between the two thresholds, and after both."""
    options = {"generator_after_images": 16, "adversarial_after_images": 32, "fake_clip_value": None, "decay_from": 0.5}
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = build(teacher_folder("ddpm"), **options)
    run = fit(whole, saves, steps=6)
    assert adam_steps(run) == [4, 6]
    for step in (1, 2, 3, 5):
        module = build(teacher_folder("ddpm"), **options)
        again = fit(module, steps=6, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert adam_steps(again) == [4, 6] and module.images == whole.images == 48
        for name, value in module.state_dict().items():
            assert torch.equal(value, whole.state_dict()[name]), (step, name)


def test_a_checkpoint_of_before_these_settings_loads(teacher_folder, tmp_path):
    run = fit(build(teacher_folder("ddpm")), steps=1)
    run.save_checkpoint(tmp_path / "now.ckpt")
    checkpoint = torch.load(tmp_path / "now.ckpt", weights_only=True)
    for name in AT_ONCE:
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    module = SiD.load_from_checkpoint(tmp_path / "old.ckpt")
    assert (module.images, module.generator_after_images) == (8, 100_000)
    assert module.sample(2).shape == (2, 1, 8, 8)


def test_a_grad_scaler_sees_the_gradients_that_wait(teacher_folder):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    module = build(teacher_folder("v"), Watch, eps=1e-6, generator_after_images=16)
    run = fit(module, steps=3, precision=None, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    assert module.moved() == [False, False, True]
    assert adam_steps(run) == [1, 3]


# What is refused, and what is said.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator_after_images": -1}, "generator_after_images=-1 must be 0 or more"),
        ({"adversarial_after_images": 0.5}, "adversarial_after_images=0.5 must be a whole number of 0 or more"),
        ({"fake_clip_value": -1.0}, "fake_clip_value=-1.0 must be 0 or more"),
        ({"adversarial": False, "fake_clip_value": 1.0}, "fake_clip_value=1.0 is read with adversarial=True alone"),
        ({"adversarial": False, "generator_after_images": 8}, "generator_after_images=8 is read with adversarial=Tr"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError) as error:
        build("nowhere", **arguments)
    assert str(error.value).startswith(message)


def test_a_run_that_ends_before_the_generator_begins_says_so(teacher_folder):
    """For 100,000 images nothing but the fake score is trained, which is more than a first try has."""
    with pytest.warns(UserWarning, match=r"generator_after_images=16: this run ends after 16 images, before .* set it"):
        fit(build(teacher_folder("ddpm"), generator_after_images=16), steps=2)
    with pytest.warns(UserWarning, match=r"^adversarial_after_images=200000: this run ends after 16 images"):
        fit(build(teacher_folder("ddpm"), adversarial_after_images=None), steps=2)
