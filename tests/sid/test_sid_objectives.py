"""The two updates against plain autograd on the written losses, in double precision."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_plugins.sid.adversarial import encoder_logits
from lightning_plugins.sid.denoiser import Denoiser
from lightning_plugins.sid.noise_levels import draw_levels
from lightning_plugins.sid.objectives import Distillation, Draws

N, SHAPE = 4, (2, 5, 5)


class Score(nn.Module):
    """A denoiser of sigma that is no straight line."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)
        self.double()

    def forward(self, x, sigma):
        self.middle = torch.tanh(self.first(x / (1 + sigma.view(-1, 1, 1, 1))))
        return self.last(self.middle)

    def logits(self):
        """As SiDA reads them, of the latest call."""
        return self.middle.mean(1)


@pytest.fixture
def case():
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    draws = Draws(normal(N, *SHAPE), normal(N, *SHAPE), normal(N).exp(), torch.zeros(N, dtype=torch.bool))
    return SimpleNamespace(
        images=normal(N, *SHAPE), draws=draws, teacher=Score(1), fake=Score(2), real=normal(N, *SHAPE)
    )


def generator_terms(images, draws, teacher, fake, logits=None, scale=1.0, **settings):
    """The terms for a generator that makes these images, and the gradient by them of the loss."""
    made = images.detach().requires_grad_()
    terms = Distillation(**settings).generator_terms(lambda z: made, teacher, fake, draws, logits, scale)
    (gradient,) = torch.autograd.grad(terms.objective.sum(), made)
    return SimpleNamespace(**terms._asdict(), gradient=gradient / 100)


def fake_score_loss(images, draws, fake, levels="edm", sigma_data=0.5, real=None, logits=None):
    settings = Distillation(fake_levels=levels, sigma_data=sigma_data)
    return settings.fake_score_loss(lambda z: images, fake, draws, real, logits)


def per_sample(value):
    return value.view(-1, 1, 1, 1)


def written(case, alpha=1.2, weighting="l1", kind="sid", adversarial=False):
    """The loss, its gradient by the images, and the divergence, from the formulas."""
    x = case.images.clone().requires_grad_()
    noisy = x + per_sample(case.draws.sigma) * case.draws.noise
    ours, theirs = case.teacher(noisy, case.draws.sigma), case.fake(noisy, case.draws.sigma)
    omega = 1 / (x - ours).detach().abs().mean((1, 2, 3))
    weight = omega if weighting == "l1" else torch.ones(N)
    delta = ours - theirs
    if kind == "sid":
        loss = weight * ((1 - alpha) * delta.square() + delta * (theirs - x)).sum((1, 2, 3))
    else:
        loss = weight * ((theirs - ours).detach() * x).sum((1, 2, 3))
    objective = loss
    if adversarial:  # 100 of SiD and 0.01 of GAN, half and half; the factor 100 comes with the update
        entropy = -case.fake.logits().sigmoid().log().mean((1, 2)) * 2 * 5 * 5
        objective = (100 * loss + 0.01 * omega * entropy) / 2 / 100
    (gradient,) = torch.autograd.grad(objective.sum(), x)
    return loss.detach(), gradient, (weight * delta.square().sum((1, 2, 3))).detach()


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 1.2},
        {"alpha": 0.5, "weighting": "none"},
        {"alpha": 1.0, "kind": "reverse_kl"},
        {"alpha": 1.0, "adversarial": True},
        {"alpha": 1.0, "adversarial": True, "weighting": "none"},
    ],
    ids=str,
)
def test_generator_gradient(case, options):
    expected = written(case, **options)
    logits = case.fake.logits if options.pop("adversarial", False) else None
    for scale in (1.0, torch.tensor(1024.0)):
        terms = generator_terms(case.images, case.draws, case.teacher, case.fake, logits=logits, scale=scale, **options)
        found = (terms.loss, terms.gradient, terms.divergence)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert terms.finite.all()
        assert not any(value.requires_grad for value in (terms.loss, terms.divergence, terms.finite))


def test_at_the_start_nothing_moves(case):
    """The fake score equals the teacher: difference, loss and gradient are 0, for every alpha."""
    for alpha in (0.5, 1.0, 1.2):
        terms = generator_terms(case.images, case.draws, case.teacher, case.teacher, alpha=alpha)
        for value in (terms.loss, terms.gradient, terms.divergence):
            assert torch.equal(value, torch.zeros_like(value))


class Backwards(TorchDispatchMode):
    """Which gradients each convolution's backward pass computes: of its input, weight and bias."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[10]))
        return func(*args, **(kwargs or {}))


def test_no_gradient_of_a_score_s_parameters_is_computed(case):
    """Not even for the fake score, whose parameters are to be trained by another loss."""
    with Backwards() as seen:
        generator_terms(case.images, case.draws, case.teacher, case.fake, alpha=1.2)
    assert seen.masks == [[True, False, False]] * 4  # two layers of each score
    parameters = [*case.teacher.parameters(), *case.fake.parameters()]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in parameters)
    with Backwards() as seen:  # the same count of the fake score's own update
        images = case.images.detach()
        fake_score_loss(images, case.draws, case.fake, "edm", 0.5).sum().backward()
    assert seen.masks == [[True, True, True], [False, True, True]]


def test_samples_that_are_not_finite_are_left_out(case):
    whole = generator_terms(case.images, case.draws, case.teacher, case.fake, alpha=1.2)
    case.images[1, 0, 2, 2] = float("nan")
    case.images[2, 1] = float("inf")
    terms = generator_terms(case.images, case.draws, case.teacher, case.fake, alpha=1.2)
    assert terms.finite.tolist() == [True, False, False, True]
    assert torch.equal(terms.gradient[1:3], torch.zeros_like(terms.gradient[1:3]))
    assert torch.equal(terms.gradient[[0, 3]], whole.gradient[[0, 3]])
    loss = fake_score_loss(case.images, case.draws, case.fake, "edm", 0.5)
    loss.sum().backward()
    found = [parameter.grad.clone() for parameter in case.fake.parameters()]
    case.fake.zero_grad()
    good = [0, 3]
    rows = Draws(*(value[good] for value in case.draws))
    expected = fake_score_loss(case.images[good], rows, case.fake, "edm", 0.5)
    expected.sum().backward()
    torch.testing.assert_close(loss[good], expected)
    assert loss[1:3].tolist() == [0, 0]
    for ours, parameter in zip(found, case.fake.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_an_overflow_is_left_to_a_grad_scaler():
    """A finite loss whose gradient is not: dropped without a scaler, which must see it to lower its scale."""

    class Overflows(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 0.5 * x

        @staticmethod
        def backward(ctx, gradient):
            return torch.full_like(gradient, float("inf"))

    zeros = torch.zeros(1, dtype=torch.bool)
    draws = Draws(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.ones(1), zeros)
    terms = [
        generator_terms(
            torch.ones(1, 1, 2, 2), draws, lambda x, s: Overflows.apply(x), lambda x, s: x / 3, alpha=1, scale=s
        )
        for s in (1.0, torch.tensor(2.0))
    ]
    assert [bool(term.finite) for term in terms] == [False, True]
    assert torch.equal(terms[0].gradient, torch.zeros(1, 1, 2, 2))
    assert not terms[1].gradient.isfinite().any()


def test_fake_score_loss(case):
    sigma, noisy = case.draws.sigma, case.images + per_sample(case.draws.sigma) * case.draws.noise
    error = (case.fake(noisy, sigma) - case.images).square().sum((1, 2, 3))
    weight = (sigma**2 + 0.7**2) / (sigma * 0.7) ** 2
    terms = fake_score_loss(case.images, case.draws, case.fake, "edm", 0.7)
    torch.testing.assert_close(terms, weight * error, rtol=1e-9, atol=0)
    epsilon = (noisy - case.fake(noisy, sigma)) / per_sample(sigma)
    terms = fake_score_loss(case.images, case.draws, case.fake, "grid", 0.7)
    torch.testing.assert_close(terms, (epsilon - case.draws.noise).square().sum((1, 2, 3)), rtol=1e-9, atol=0)

    terms = fake_score_loss(case.images, case.draws, case.fake, "edm", 0.7, case.real, case.fake.logits)
    case.fake(noisy, sigma)
    generated = case.fake.logits().sigmoid()
    case.fake(case.real + per_sample(sigma) * case.draws.noise, sigma)
    entropy = -(1 - generated).log().mean((1, 2)) - case.fake.logits().sigmoid().log().mean((1, 2))
    torch.testing.assert_close(terms, weight * (error + entropy / 2), rtol=1e-9, atol=0)


def test_levels_are_the_teacher_s():
    import diffusers

    grid = Denoiser(nn.Conv2d(1, 1, 1), diffusers.DDPMScheduler())
    free = Denoiser(nn.Conv2d(1, 1, 1), diffusers.EDMEulerScheduler())

    def draw(denoiser, kind, fake, t_min=0.0, t_max=800.0, n=4000):
        random = torch.Generator().manual_seed(0)
        return draw_levels(denoiser, n, kind, random, fake=fake, t_min=t_min, t_max=t_max)

    for fake in (False, True):
        on, off = draw(grid, "edm", fake), draw(free, "edm", fake)
        assert torch.isin(on, grid.sigmas).all()
        inside = (off > grid.sigma_min) & (off < grid.sigma_max)
        assert ((on / off).log()[inside].abs() < 0.25).all()
        assert torch.equal(draw(grid, "edm", fake), on)
    assert draw(free, "edm", False).max() < 24.41 < draw(free, "edm", False, t_max=1000).max()
    assert draw(free, "edm", False, t_min=790).min() > 20
    assert draw(free, "edm", True).log().mean().item() == pytest.approx(-1.2, abs=0.1)
    assert draw(free, "edm", True).log().std().item() == pytest.approx(1.2, abs=0.1)

    t = grid.timesteps(draw(grid, "grid", False, 20, 980))
    assert (t.min(), t.max()) == (20, 979)
    assert t.float().mean().item() == pytest.approx(499.5, abs=15)
    t = grid.timesteps(draw(grid, "grid", True, 20, 980, n=20_000))  # the fake score's are all of them
    assert (t.min(), t.max()) == (0, 999)
    with pytest.raises(ValueError, match=r"^noise_levels='grid' needs timesteps.*: use 'edm'\.$"):
        draw(free, "grid", False)


def test_a_network_without_an_encoder_is_refused():
    match = r"adversarial=True reads a U-Net's mid_block, which Conv2d has not"
    with pytest.raises(ValueError, match=match), encoder_logits(nn.Conv2d(1, 1, 1)):
        pass
