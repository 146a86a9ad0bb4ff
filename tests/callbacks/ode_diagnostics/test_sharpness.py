"""Top eigenvalues against eigvalsh, scipy and curvlinops: matrices, small nets under every optimizer, and a CNN."""

import copy
from importlib.util import find_spec

import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, RMSprop
from toys import Classifier, ImageClassifier, mlp
from trainers import fit

from lightning_plugins import Digits, ODEDiagnostics
from lightning_plugins.callbacks.ode_diagnostics.optimizer_flow import read_flow, rule_of
from lightning_plugins.callbacks.ode_diagnostics.sharpness import random_direction, top_eigenpair


def symmetric(values, seed=0):
    """A matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return basis @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ basis.T


def split(vector):
    """One vector as a list of tensors of several shapes."""
    return [vector[:4].view(2, 2), vector[4:]]


def operator(matrix):
    return lambda v: split(matrix @ torch.cat([part.flatten() for part in v]))


SPECTRA = {
    "spread": [*torch.linspace(0, 1, 39).tolist(), 3.0],
    "close": [*torch.linspace(0, 1, 39).tolist(), 1.02],
    "more negative": [-50.0, *torch.linspace(-1, 1, 38).tolist(), 2.0],
    "all negative": torch.linspace(-3, -1, 40).tolist(),
    "double": [*torch.linspace(0, 1, 38).tolist(), 2.0, 2.0],
    "a million": torch.logspace(-3, 3, 40).tolist(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_top_of_a_spectrum(name):
    values = SPECTRA[name]
    matrix = symmetric(values)
    start = random_direction(split(torch.zeros(40, dtype=torch.float64)))
    pair = top_eigenpair(operator(matrix), start, rtol=1e-10, max_products=200)
    assert pair.value == pytest.approx(max(values), rel=1e-7)
    vector = torch.cat([part.flatten() for part in pair.vector])
    assert vector.norm() == pytest.approx(1)
    assert (matrix @ vector - pair.value * vector).norm() < 1e-3 * abs(pair.value)


def test_products_are_few_counted_and_bounded():
    """Much fewer than power iteration's; hardly any from a good start."""
    matrix, calls = symmetric(SPECTRA["close"]), []

    def product(v):
        calls.append(1)
        return operator(matrix)(v)

    start = random_direction(split(torch.zeros(40, dtype=torch.float64)))
    pair = top_eigenpair(product, start, rtol=1e-6, max_products=200)
    assert pair.products == len(calls) < 40  # power iteration: ln(1e6) / ln(1.02) / 2 = 350
    assert pair.value == pytest.approx(1.02, rel=1e-5)
    again = top_eigenpair(operator(matrix + 1e-3 * symmetric(SPECTRA["spread"], 1)), pair.vector, rtol=1e-3)
    assert again.products <= 4
    assert top_eigenpair(product, start, max_products=5).products == 5


def test_degenerate_operators():
    start = [torch.tensor([1.0, 2.0, 2.0])]
    exact = top_eigenpair(lambda v: [3 * v[0]], start)  # every vector is an eigenvector
    assert exact.value == pytest.approx(3, rel=1e-6)
    assert top_eigenpair(lambda v: [0 * v[0]], start).value == 0
    overflow = top_eigenpair(lambda v: [v[0] * torch.inf], start)
    assert overflow.value != overflow.value or overflow.value == float("inf")
    assert overflow.products <= 2
    one = top_eigenpair(lambda v: [-2 * v[0]], [torch.tensor([5.0])])
    assert one.value == pytest.approx(-2)


def test_random_directions_leave_the_random_state_alone():
    state = torch.get_rng_state()
    a, b = (random_direction([torch.zeros(3), torch.zeros(4)]) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[0], a[1][:3])


# Whole nets, in training


class Net(Classifier):
    """A small smooth net in float64, which keeps what it was after each step."""

    def __init__(self, optimizer):
        super().__init__(mlp(4, 6, 3, seed=3).double(), optimizer)
        self.after = []

    def on_train_batch_end(self, *args):
        optimizer = self.trainer.optimizers[0]
        flow = read_flow(optimizer, rule_of(optimizer), list(self.parameters()))
        self.after.append((copy.deepcopy(self.net), flow))


OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd-l2": lambda p: SGD(p, lr=0.1, weight_decay=0.05),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, alpha=0.9),
    "adam": lambda p: Adam(p, lr=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adam-l2": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "maximize": lambda p: SGD(p, lr=0.1, maximize=True),
    "groups": lambda p: SGD([{"params": [q], "lr": 0.1 / (i + 1)} for i, q in enumerate(p)]),
}


def hessian(net, batch):
    """All second derivatives by autograd, a row at a time."""
    params = list(net.parameters())
    first = torch.autograd.grad(F.cross_entropy(net(batch[0]), batch[1]), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in first])
    rows = [torch.autograd.grad(entry, params, retain_graph=True, materialize_grads=True) for entry in flat]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.mark.parametrize("engine", ["finite_difference", "exact"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sharpness_equals_eigvalsh_in_six_digits(name, engine):
    """Of the preconditioned Hessian, at the parameters after the step; the second time from a warm start."""
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(20, 4, dtype=torch.float64, generator=generator), torch.arange(20) % 3
    search = {"sharpness_engine": engine, "sharpness_rtol": 1e-9, "sharpness_max_products": 200}
    callback = ODEDiagnostics(1, sharpness_every_n_steps=3, **search)
    module = Net(OPTIMIZERS[name])
    fit(module, [batch] * 6, callback)
    assert [("ode/sharpness" in row) for row in callback.history] == [False, False, True] * 2
    for row, (net, flow) in list(zip(callback.history, module.after, strict=True))[2::3]:
        H = hessian(net, batch) * (-1 if name == "maximize" else 1)
        rates, decays = (
            torch.cat(
                [(torch.ones_like(p) * number).flatten() for p, number in zip(net.parameters(), numbers, strict=True)]
            )
            for numbers in (flow.rates, flow.decays)
        )
        root = rates.detach().sqrt()
        H += torch.diag(decays.detach())
        top = torch.linalg.eigvalsh(root[:, None] * H * root)[-1].item()
        assert row["ode/sharpness"] == pytest.approx(top / flow.h, rel=1e-6)
        assert row["ode/edge_ratio"] == pytest.approx(top / flow.limit, rel=1e-6)


def cnn(smooth, normalised):
    """Convolutions, pooling and activations; with or without kinks and batch norm."""
    torch.manual_seed(0)
    activation, pool = (nn.Tanh, nn.AvgPool2d) if smooth else (nn.ReLU, nn.MaxPool2d)
    norm = nn.BatchNorm2d if normalised else nn.Identity
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        norm(8),
        activation(),
        pool(2),
        nn.Conv2d(8, 16, 3, padding=1),
        norm(16),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


def top_by_scipy(operator):
    return scipy.sparse.linalg.eigsh(operator, k=1, which="LA", return_eigenvectors=False, tol=1e-9)[0]


def autograd_operator(net, x, y):
    """Double backward as a scipy operator."""
    params = list(net.parameters())
    first = torch.autograd.grad(F.cross_entropy(net(x), y), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in first])

    def product(vector):
        v = torch.as_tensor(vector.ravel())
        return torch.cat([h.flatten() for h in torch.autograd.grad(flat @ v, params, retain_graph=True)]).numpy()

    return scipy.sparse.linalg.LinearOperator((len(flat), len(flat)), product, dtype="float64")


def train_cnn(smooth, normalised, engine, dtype):
    """Five steps on one batch of digits: the callback, the net after the last step, and the batch, both in float64."""
    torch.set_num_threads(1)
    data = Digits(image_size=14, batch_size=64)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    batch["image"] = batch["image"].to(dtype)
    module = ImageClassifier(cnn(smooth, normalised), lambda p: SGD(p, lr=0.2)).to(dtype)
    search = {"sharpness_engine": engine, "sharpness_rtol": 1e-7}
    callback = ODEDiagnostics(5, sharpness_every_n_steps=5, **search)
    fit(module, [batch] * 5, callback)
    return callback, module.net.double().train(), batch["image"].double(), batch["label"]


@pytest.mark.parametrize(
    ("smooth", "normalised", "engine", "dtype", "rtol"),
    [
        (False, False, "auto", torch.float64, 1e-6),
        (False, False, "auto", torch.float32, 1e-4),
        (True, False, "auto", torch.float64, 1e-6),
        (True, False, "finite_difference", torch.float64, 1e-6),
        (True, False, "finite_difference", torch.float32, 1e-2),
        (False, True, "auto", torch.float64, 1e-6),
        (True, True, "finite_difference", torch.float64, 1e-6),
    ],
)
def test_sharpness_of_a_cnn(smooth, normalised, engine, dtype, rtol):
    """Finite differences take kinks for curvature, so that they are compared where there are none."""
    callback, net, x, y = train_cnn(smooth, normalised, engine, dtype)
    top = top_by_scipy(autograd_operator(net, x, y))
    assert callback.history[-1]["ode/sharpness"] == pytest.approx(top, rel=rtol)
    assert callback.sharpness_products <= 50


# An extra of the tests that most installations lack: the same CNN is compared with scipy above in any case.
@pytest.mark.skipif(not find_spec("curvlinops"), reason="pip install lightning_plugins[curvature]")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # its own imports
@pytest.mark.parametrize("smooth", [False, True])
def test_curvlinops_agrees(smooth):
    """With what is logged. Not with batch norm, whose forward derivative curvlinops 3.0.1 takes wrongly in training."""
    from curvlinops import HessianLinearOperator

    callback, net, x, y = train_cnn(smooth, False, "auto", torch.float64)
    theirs = HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)])
    assert callback.history[-1]["ode/sharpness"] == pytest.approx(top_by_scipy(theirs.to_scipy()), rel=1e-6)
