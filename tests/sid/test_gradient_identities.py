"""The generator's loss against the Fisher divergence, by Gauss-Hermite quadrature in float64 in the plane.

The student draws one of two affine maps of unit noise, so that its noised density is known, and with it the exact fake
score. The reference, F = E|S_phi - S_psi|^2, is built from gradients of log densities and integrated over x_t in two
dimensions; the loss gets posterior means by their closed form, and is integrated over latent and noise, in four.
"""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from lightning_plugins.sid import losses

# Weights, means and covariances of each.
GAUSSIAN = ([1.0], [[0.4, -0.3]], [[[1.1, 0.3], [0.3, 0.7]]])
MIXTURE = ([0.5, 0.3, 0.2], [[-0.8, 0.0], [0.9, 0.4], [0.1, -0.9]], [[[0.5, 0.1], [0.1, 0.4]]] * 3)
ONE = ([1.0], [[0.0, 0.2]], [[[0.9, 0.1], [-0.2, 0.8]]])  # weights, shifts and maps of the student
TWO = ([0.6, 0.4], [[-0.4, 0.3], [0.5, -0.2]], [[[0.8, 0.1], [0.0, 0.7]], [[0.7, -0.1], [0.2, 0.9]]])


def grid(nodes, dim):
    """Points ``(nodes ** dim, dim)`` and weights for expectations over unit normal noise."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    points = torch.cartesian_prod(*[x] * dim)
    return points, torch.cartesian_prod(*[w / w.sum()] * dim).prod(1)


def params(weights, means, matrices):
    return [torch.tensor(a, dtype=torch.float64) for a in (weights, means, matrices)]


def log_density(x, weights, means, covariances):
    parts = [MultivariateNormal(m, c).log_prob(x) for m, c in zip(means, covariances, strict=True)]
    return (torch.stack(parts, 1) + weights.log()).logsumexp(1)


def score(x, weights, means, covariances):
    """The gradient of the log density, itself differentiable in everything."""
    inner = x if x.requires_grad else x.clone().requires_grad_(True)
    return torch.autograd.grad(log_density(inner, weights, means, covariances).sum(), inner, create_graph=True)[0]


def denoise(x, sigma, weights, means, covariances):
    """E[x_0 | x_t], the mean of each Gaussian's posterior by its responsibility."""
    noised = covariances + sigma**2 * torch.eye(2, dtype=x.dtype)
    inverse = torch.linalg.inv(noised)
    offset = x - means[:, None]  # (K, N, 2)
    logits = weights.log() - noised.logdet() / 2 - (offset @ inverse * offset).sum(-1).T / 2
    each = means[:, None] + offset @ (inverse @ covariances)
    return (logits.softmax(1).T[..., None] * each).sum(0)


class Case:
    """A teacher and a student at one noise level; what is expected of its loss, and of F."""

    def __init__(self, teacher, student, sigma, nodes):
        self.teacher, self.sigma, self.nodes = params(*teacher), sigma, nodes
        self.weights, self.shifts, self.maps = params(*student)
        self.theta = [self.shifts.requires_grad_(True), self.maps.requires_grad_(True)]

    def student(self, constant=False):
        shifts, maps = (p.detach() for p in self.theta) if constant else self.theta
        return self.weights, shifts, maps @ maps.mT

    def divergence(self, sampling_cut=False):
        """F over x_t, drawn from each noised Gaussian of the student."""
        u, w = grid(4 * self.nodes, 2)
        noise = self.sigma**2 * torch.eye(2, dtype=u.dtype)
        noised = lambda weights, means, covariances: (weights, means, covariances + noise)  # noqa: E731
        total = 0
        for k, (_, shift, covariance) in enumerate(zip(*noised(*self.student(sampling_cut)), strict=True)):
            x = shift + u @ torch.linalg.cholesky(covariance).mT
            gap = score(x, *noised(*self.teacher)) - score(x, *noised(*self.student()))
            total = total + self.weights[k] * w @ gap.square().sum(1)
        return total

    def expected(self, loss):
        """E of ``loss(x_g, x_t, teacher, fake)`` over latent and noise; the fake score's parameters are cut."""
        u, w = grid(self.nodes, 4)
        z, noise = u[:, :2], u[:, 2:]
        total = 0
        for k, (shift, matrix) in enumerate(zip(*self.theta, strict=True)):
            x_g = shift + z @ matrix.mT
            x_t = x_g + self.sigma * noise
            teacher = denoise(x_t, self.sigma, *self.teacher)
            fake = denoise(x_t, self.sigma, *self.student(constant=True))
            total = total + self.weights[k] * w @ loss(x_g, x_t, teacher, fake)
        return total

    def sid(self, alpha):
        """The loss in units of the divergence of scores."""
        return self.sigma**-4 * self.expected(
            lambda x_g, x_t, teacher, fake: losses.generator_loss(x_g, teacher, fake, alpha, "none")
        )

    def gradient(self, value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, self.theta)])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# Student and teacher Gaussian: polynomials, for which four nodes are exact. Mixtures: what so many nodes leave.
CASES = {
    "Gaussian, sigma 0.5": (GAUSSIAN, ONE, 0.5, 4, 1e-12),
    "Gaussian, sigma 3": (GAUSSIAN, ONE, 3.0, 4, 1e-12),
    "mixture, sigma 3": (MIXTURE, ONE, 3.0, 8, 1e-8),
    "mixture, two maps, sigma 1": (MIXTURE, TWO, 1.0, 16, 1e-8),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    *setting, tolerance = CASES[request.param]
    made = Case(*setting)
    value = made.divergence()
    made.divergence_value, made.tolerance = value.item(), tolerance
    made.gradient_of_f = made.gradient(value)
    made.gradient_of_f_plus = made.gradient(made.divergence(sampling_cut=True))
    made.gradients = {alpha: made.gradient(made.sid(alpha)) for alpha in (0.5, 1.0)}
    return made


@torch.no_grad()
def test_the_value_is_the_divergence_times_one_minus_alpha(case):
    """So that it is no figure of progress: 0 at alpha = 1, whatever F is."""
    assert case.divergence_value > 5e-4
    for alpha in (0.0, 0.5, 1.0, 1.2):
        error = case.sid(alpha).item() - (1 - alpha) * case.divergence_value
        assert abs(error) < case.tolerance * case.divergence_value, alpha
    same = case.expected(lambda x_g, x_t, teacher, fake: losses.fisher_divergence(teacher, fake)).item()
    assert same / case.sigma**4 == pytest.approx(case.divergence_value, rel=case.tolerance)


def test_one_half_is_unbiased_and_one_has_its_sampling_cut(case):
    assert distance(2 * case.gradients[0.5], case.gradient_of_f) < case.tolerance
    assert distance(2 * case.gradients[1.0], case.gradient_of_f_plus) < case.tolerance
    assert distance(case.gradient_of_f_plus, case.gradient_of_f) > 0.01  # else nothing was told apart


def test_every_alpha_differs_by_the_naive_gradient(case):
    """2 grad L = grad F - (2 alpha - 1) grad L1, the last with the fake score constant."""
    naive = case.gradient_of_f - case.gradient_of_f_plus
    loss = case.expected(lambda x_g, x_t, teacher, fake: losses.fisher_divergence(teacher, fake))
    assert distance(case.gradient(loss / case.sigma**4), naive) < 30 * case.tolerance  # a small difference
    wanted = case.gradient_of_f - (2 * 1.2 - 1) * naive
    assert distance(2 * case.gradient(case.sid(1.2)), wanted) < case.tolerance


def test_the_relative_follows_the_reverse_divergence(case):
    u, w = grid(4 * case.nodes, 2)
    noise = case.sigma**2 * torch.eye(2, dtype=u.dtype)
    weights, means, covariances = case.student()
    student = (weights, means, covariances + noise)
    teacher = (*case.teacher[:2], case.teacher[2] + noise)
    divergence = 0
    for weight, mean, covariance in zip(*student, strict=True):
        x = mean + u @ torch.linalg.cholesky(covariance).mT
        divergence = divergence + weight * w @ (log_density(x, *student) - log_density(x, *teacher))
    loss = case.expected(lambda x_g, x_t, teacher, fake: losses.reverse_kl_loss(x_g, teacher, fake, "none"))
    assert distance(case.gradient(loss / case.sigma**2), case.gradient(divergence)) < case.tolerance


def test_the_fake_score_loss_is_least_at_the_exact_one(case):
    """No perturbation of the exact fake score lowers it to first order."""
    sigma = torch.full((case.nodes**4,), case.sigma, dtype=torch.float64)

    def slope(start):
        size = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        loss = case.expected(
            lambda x_g, x_t, teacher, fake: losses.fake_score_loss(
                fake.detach() + size * x_t.detach().square(), x_g.detach(), sigma
            )
        )
        return torch.autograd.grad(loss, size)[0].item()

    assert abs(slope(0.0)) < case.tolerance * abs(slope(0.1))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_at_the_optimum_every_member_rests(alpha):
    """The student is the teacher: the scores agree at every point, so that no gradient is left."""
    covariance = torch.tensor(GAUSSIAN[2], dtype=torch.float64)
    case = Case(GAUSSIAN, (*GAUSSIAN[:2], torch.linalg.cholesky(covariance).tolist()), 0.7, 4)
    assert case.gradient(case.sid(alpha)).abs().max() < 1e-14
    assert abs(case.sid(alpha).item()) < 1e-14
    loss = case.expected(lambda x_g, x_t, teacher, fake: losses.generator_loss(x_g, teacher, fake, alpha))
    assert case.gradient(loss).abs().max() < 1e-13  # the paper's weight leaves the point of rest


def test_the_papers_weight_is_biased_but_not_far_off():
    """Why a weight of the noise level alone is an option: the paper's depends on the noise itself."""
    case = Case(GAUSSIAN, ONE, 0.5, 8)
    loss = case.expected(lambda x_g, x_t, teacher, fake: losses.generator_loss(x_g, teacher, fake, 0.5))
    cosine = torch.cosine_similarity(case.gradient(loss), case.gradient(case.divergence()), dim=0).item()
    assert 0.8 < cosine < 0.999


@pytest.mark.parametrize(("alpha", "weighting"), [*itertools.product([0.5, 1.0, 1.2], ["l1", "none"])])
def test_a_fresh_copy_of_the_teacher_gives_exactly_nothing(alpha, weighting):
    """As training starts: the fake score is a copy, so that difference, loss and gradient are 0 to the last bit."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 3, padding=1)]
    teacher = nn.Sequential(*layers).eval().requires_grad_(False)
    fake, student = copy.deepcopy(teacher), copy.deepcopy(teacher).requires_grad_(True)
    x_g = student(torch.randn(4, 2, 8, 8))
    x_t = x_g + torch.randn_like(x_g)
    d_teacher, d_fake = teacher(x_t), fake(x_t)
    assert torch.equal(losses.fisher_divergence(d_teacher, d_fake), torch.zeros(4))
    loss = losses.generator_loss(x_g, d_teacher, d_fake, alpha, weighting)
    assert torch.equal(loss, torch.zeros(4))
    loss.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in student.parameters())
    assert math.isfinite(x_g.sum().item()) and x_g.std() > 0.1
