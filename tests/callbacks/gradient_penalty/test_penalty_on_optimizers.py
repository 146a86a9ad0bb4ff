"""The penalty beside what optimizers are told of their parameters: groups that maximize, weights listed twice."""

import copy

import pytest
import torch
from torch import nn
from toys import Classifier, flat, mlp
from trainers import fit

from lightning_plugins import GradientPenalty, gradient_penalty_backward

C = 0.7
ENGINES = {
    "exact": ({"engine": "exact"}, 1e-12),
    "central": ({"difference": "central"}, 1e-7),
    "forward": ({"difference": "forward"}, 1e-5),
}


def batches(n=4, size=6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, size, 5, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (n, size), generator=generator), strict=True))


class Climber(Classifier):
    """Two groups of parameters, each of which climbs or descends the loss."""

    def __init__(self, climbs, tied=False):
        super().__init__(mlp(5, 5, 3, seed=0).double())
        self.climbs, self.tied, self.seen = climbs, tied, []

    def groups(self):
        groups = [list(self.net[0].parameters()), list(self.net[2].parameters())]
        return [2 * group if self.tied else group for group in groups]

    def configure_optimizers(self):
        pairs = zip(self.groups(), self.climbs, strict=True)
        return torch.optim.SGD([{"params": group, "maximize": climbs} for group, climbs in pairs], lr=0.05)

    def on_before_optimizer_step(self, optimizer):
        self.seen.append((copy.deepcopy(self.net), flat(param.grad for param in self.net.parameters())))


def expected(module, net, window, scope, norm):
    """The loss's gradient, plus the penalty's where it is descended, minus it where the optimizer climbs."""
    params = list(net.parameters())

    def penalty(loss):
        squared = sum(g.square().sum() for g in torch.autograd.grad(loss, params, create_graph=True))
        return squared if norm == "squared" else squared.sqrt()

    losses = [nn.functional.cross_entropy(net(x), y) for x, y in window]
    mean = sum(losses) / len(losses)
    plain = torch.autograd.grad(mean, params, retain_graph=True)
    penalised = penalty(mean) if scope == "step" else sum(map(penalty, losses)) / len(losses)
    extra = torch.autograd.grad(C * penalised, params)
    signs = [-1.0 if climbs else 1.0 for climbs in module.climbs for _ in range(2)]
    assert flat(extra).norm() > 0.05 * flat(plain).norm()
    return flat(g + sign * e for g, sign, e in zip(plain, signs, extra, strict=True))


@pytest.mark.parametrize("norm", ["squared", "norm"])
@pytest.mark.parametrize(("k", "scope"), [(1, "step"), (2, "step"), (2, "microbatch")])
@pytest.mark.parametrize("climbs", [(True, True), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_penalty_is_descended_by_whatever_climbs(engine, climbs, k, scope, norm):
    arguments, tolerance = ENGINES[engine]
    module = Climber(climbs)
    fit(module, data := batches(), GradientPenalty(C, scope=scope, norm=norm, **arguments), accumulate_grad_batches=k)
    assert len(module.seen) == 4 // k
    for step, (net, found) in enumerate(module.seen):
        wanted = expected(module, net, data[step * k : (step + 1) * k], scope, norm)
        assert (found - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("engine", ENGINES)
def test_to_maximize_minus_the_loss_is_to_minimize_it(engine):
    """The penalty is the same, whatever the sign of the loss."""

    class Hill(Climber):
        def loss(self, batch):
            return -super().loss(batch)

    arguments, tolerance = ENGINES[engine]
    hill, valley = Hill((True, True)), Climber((False, False))
    start = flat(valley.parameters())
    for module in (hill, valley):
        fit(module, batches(), GradientPenalty(C, **arguments), max_epochs=5)
    way = (flat(valley.parameters()) - start).norm()
    assert (flat(hill.parameters()) - flat(valley.parameters())).norm() < 10 * tolerance * way


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("scope", ["step", "microbatch"])
@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_a_group_lists_twice_count_once(engine, scope, k):
    arguments, tolerance = ENGINES[engine]
    module = Climber((False, False), tied=True)
    fit(module, data := batches(), GradientPenalty(C, scope=scope, **arguments), accumulate_grad_batches=k)
    for step, (net, found) in enumerate(module.seen):
        wanted = expected(module, net, data[step * k : (step + 1) * k], scope, "squared")
        assert (found - wanted).norm() < tolerance * wanted.norm()


class Manual(Climber):
    """The same by manual optimization; ``arguments`` are those of gradient_penalty_backward."""

    def __init__(self, climbs, tied=False, **arguments):
        super().__init__(climbs, tied)
        self.automatic_optimization, self.arguments = False, arguments

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        params = [param for group in optimizer.param_groups for param in group["params"]]
        gradient_penalty_backward(self, lambda: self.loss(batch), C, params, **self.arguments)
        self.on_before_optimizer_step(optimizer)
        optimizer.step()

    on_before_optimizer_step = Climber.on_before_optimizer_step


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("climbs", [(True, True), (False, True)], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_manual_optimization(engine, climbs, tied):
    arguments, tolerance = ENGINES[engine]
    module = Manual(climbs, tied, **arguments)
    fit(module, data := batches())
    for (net, found), batch in zip(module.seen[::2], data, strict=True):  # Lightning calls the hook once more
        wanted = expected(module, net, [batch], "step", "squared")
        assert (found - wanted).norm() < tolerance * wanted.norm()
