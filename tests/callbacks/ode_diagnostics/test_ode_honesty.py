"""What is omitted and said, which objective is read, and what is advised."""

import copy
import re
import warnings

import numpy as np
import pytest
import torch
from ode_names import FIRST_ORDER, IGR, names
from torch.optim import LBFGS, SGD, Adam, NAdam
from toys import LeastSquares, rows
from trainers import fit

from lightning_plugins import Flooding, GradientPenalty, ODEDiagnostics

# Honesty


class Shrinking(SGD):
    """A third-party optimizer on top of a known one."""

    def step(self, closure=None):
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    param.mul_(0.5)
        return loss


UNKNOWN = {
    "NAdam": lambda p: NAdam(p, lr=0.01),
    "Shrinking": lambda p: Shrinking(p, lr=0.01),
    "LBFGS": lambda p: LBFGS(p, lr=0.1, max_iter=3),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_optimizer_gets_the_first_order_rows_and_one_warning(name):
    SGD([torch.zeros(1)])  # from now on the hooks of SGD's step are called within Shrinking's, too
    module = LeastSquares(UNKNOWN[name])
    before = module.theta.detach().clone()
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, tol=0.1)
    x, y = rows()
    with pytest.warns(UserWarning, match=f"ODEDiagnostics: {name} is none of SGD") as caught:
        fit(module, [(x, y)], callback)
    assert len([w for w in caught if "ODEDiagnostics" in str(w.message)]) == 1
    (row,) = callback.history
    assert names(row) == FIRST_ORDER - {"clip_factor"}  # LBFGS, for one, leaves another gradient behind
    gradient = x.T @ (x @ before - y) / len(x)
    d = module.theta.detach() - before
    assert row["ode/update_norm"] == pytest.approx(d.norm().item(), rel=1e-12)  # of the whole step
    assert row["ode/grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-12)  # of the first evaluation
    assert row["ode/predicted_dloss"] == pytest.approx((gradient @ d).item(), rel=1e-12)


def test_groups_with_rules_of_their_own_get_the_first_order_rows():
    module = LeastSquares(lambda p: SGD([{"params": [q], "momentum": 0.5 * i} for i, q in enumerate(p)], lr=0.1))
    callback = ODEDiagnostics(1)
    with pytest.warns(UserWarning, match="groups of SGD differ in more than rate and weight decay"):
        fit(module, [rows()], callback)
    assert names(callback.history[0]) == FIRST_ORDER - {"clip_factor"}


class Noisy(LeastSquares):
    """What a replay cannot restore: an iterator."""

    def __init__(self, optimizer, noise):
        super().__init__(optimizer)
        self.noise, self.numbers = noise, iter(np.random.default_rng(0).uniform(1, 2, 100))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.noise * next(self.numbers))


@pytest.mark.parametrize(
    ("noise", "precision"), [(1.0, "64-true"), (1e-6, "64-true"), (1e-2, "32-true"), (1e-1, "bf16-true")]
)
def test_a_step_that_cannot_be_repeated_is_noticed(noise, precision):
    """What rounding may do depends on the precision."""
    callback = ODEDiagnostics(2)
    module = Noisy(lambda p: SGD(p, lr=0.01), noise).to(torch.float64 if precision == "64-true" else torch.float32)
    batch = tuple(part.to(module.a.dtype) for part in rows())
    with pytest.warns(UserWarning, match=r"again on the same batch gives another gradient .*an iterator"):
        fit(module, [batch] * 6, callback, precision=precision)
    assert [names(row) for row in callback.history] == [FIRST_ORDER | IGR | {"time"}] * 3


@pytest.mark.parametrize(("noise", "precision"), [(1e-10, "64-true"), (1e-6, "32-true"), (1e-4, "bf16-mixed")])
def test_noise_of_the_size_of_rounding_is_none(noise, precision):
    callback = ODEDiagnostics(2)
    module = Noisy(lambda p: SGD(p, lr=0.01), noise).to(torch.float64 if precision == "64-true" else torch.float32)
    fit(module, [tuple(part.to(module.a.dtype) for part in rows())] * 2, callback, precision=precision)
    assert "curvature_step" in names(callback.history[0])


def test_a_batch_without_a_loss_is_no_step():
    class Skips(LeastSquares):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    callback = ODEDiagnostics(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        fit(Skips(lambda p: SGD(p, lr=0.1)), [rows()] * 3, callback)
    assert [row["ode/time"] for row in callback.history] == [0.1, 0.2]
    assert callback.history[-1]["ode/skipped_steps"] == 0


# Objectives of other callbacks


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_flooding_turns_the_objective(scope):
    """Below the level all is of minus the loss; the raw loss stays."""
    module = LeastSquares(lambda p: SGD(p, lr=0.05))
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_rtol=1e-12)
    before = module.theta.detach().numpy().copy()
    x, y = rows()
    fit(module, [(x, y)], callback, Flooding(100.0, scope=scope))
    row, hessian = callback.history[0], (x.T @ x / len(x)).numpy()
    d = module.theta.detach().numpy() - before
    gradient = (x.T @ (x @ torch.as_tensor(before) - y) / len(x)).numpy()
    np.testing.assert_allclose(d, 0.05 * gradient, rtol=1e-12)  # up
    assert row["ode/predicted_dloss"] == pytest.approx(-gradient @ d)
    assert row["ode/curvature_step"] == pytest.approx(-d @ hessian @ d / (d @ d))
    assert row["ode/actual_dloss"] == pytest.approx(-(gradient @ d + d @ hessian @ d / 2))
    assert row["ode/sharpness"] == pytest.approx(-np.linalg.eigvalsh(hessian)[0], rel=1e-6)
    assert row["ode/cos_descent"] == pytest.approx(1)
    assert row["ode/loss"] > 0


def test_micro_batches_may_have_signs_of_their_own():
    x, y = rows()
    far, near = (x, y + 10), (x, y)
    callback = ODEDiagnostics(1)
    module = LeastSquares(lambda p: SGD(p, lr=0.01))
    before = copy.deepcopy(module)
    flooding = Flooding(20.0, scope="microbatch")
    fit(module, [far, near], flooding, callback, accumulate_grad_batches=2)
    (row,) = callback.history
    losses = [[m.training_step(batch, 0).item() for batch in (far, near)] for m in (before, module)]
    assert losses[0][1] < 20 < losses[0][0]
    change = ((losses[1][0] - losses[1][1]) - (losses[0][0] - losses[0][1])) / 2
    assert row["ode/actual_dloss"] == pytest.approx(change)
    assert row["ode/actual_dloss"] == pytest.approx(row["ode/predicted2_dloss"])
    assert row["ode/loss"] == pytest.approx(sum(losses[0]) / 2)


@pytest.mark.parametrize("engine", ["exact", "finite_difference"])
def test_a_penalty_is_part_of_the_objective(engine):
    """F = L + c |grad L|^2: its Hessian on a quadratic is H + 2 c H^2."""
    c, module = 0.02, LeastSquares(lambda p: SGD(p, lr=0.05))
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_rtol=1e-12)
    before = module.theta.detach().numpy().copy()
    x, y = rows()
    penalty = GradientPenalty(c, engine=engine, difference="central")
    fit(module, [(x, y)] * 2, callback, penalty)
    row, hessian = callback.history[0], (x.T @ x / len(x)).numpy()
    gradient = (x.T @ (x @ torch.as_tensor(before) - y) / len(x)).numpy()
    gradient = gradient + 2 * c * hessian @ gradient
    d = -0.05 * gradient
    whole = hessian + 2 * c * hessian @ hessian
    assert row["ode/grad_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert row["ode/curvature_step"] == pytest.approx(d @ whole @ d / (d @ d), rel=1e-5)
    assert row["ode/local_error"] == pytest.approx(0.05 / 2 * np.linalg.norm(whole @ d), rel=1e-5)
    assert row["ode/predicted2_dloss"] == pytest.approx(gradient @ d + d @ whole @ d / 2, rel=1e-5)
    assert row["ode/sharpness"] == pytest.approx(np.linalg.eigvalsh(hessian)[-1], rel=1e-6)
    assert not names(row) & {"actual_dloss", "dloss_ratio"}


def test_it_says_which_objective_it_reads(caplog):
    for callbacks, words in (
        ([], "the loss."),
        ([Flooding(0.1)], "the loss with Flooding's sign."),
        ([Flooding(0.1), GradientPenalty(0.1)], "the loss with Flooding's sign plus GradientPenalty's term; sharpness"),
    ):
        caplog.clear()
        fit(LeastSquares(lambda p: SGD(p, lr=0.1)), [rows()], ODEDiagnostics(), *callbacks)
        assert f"reads the objective that is trained: {words}" in caplog.text


# Advice


def test_one_warning_when_training_stays_beyond_the_edge():
    module = LeastSquares(lambda p: SGD(p, lr=1.0))
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, on_edge="warn")
    sentence = r"stays above its stability limit in the sharpest direction \(ode/edge_ratio = 3\.97.*suggest_lr"
    with pytest.warns(UserWarning, match=sentence) as caught:
        fit(module, [rows()] * 8, callback)
    assert len([w for w in caught if "edge_ratio = " in str(w.message)]) == 1
    fit(LeastSquares(lambda p: SGD(p, lr=0.1)), [rows()] * 8, ODEDiagnostics(1, 1, on_edge="warn"))  # below
    fit(LeastSquares(lambda p: SGD(p, lr=1.0)), [rows()] * 8, ODEDiagnostics(1, 1))  # asked for no warning


def test_suggested_rates():
    x, y = rows()
    top = torch.linalg.eigvalsh(x.T @ x / len(x))[-1].item()
    with_tol = ODEDiagnostics(1, tol=0.05)
    fit(LeastSquares(lambda p: SGD(p, lr=0.01)), [(x, y)] * 5, with_tol)
    assert with_tol.suggest_lr() == pytest.approx(np.median([row["ode/lr_for_tol"] for row in with_tol.history]))
    for momentum, limit in ((0.0, 2), (0.9, 3.8)):
        callback = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_rtol=1e-10)
        fit(LeastSquares(lambda p, b=momentum: SGD(p, lr=0.01, momentum=b)), [(x, y)] * 5, callback)
        assert callback.suggest_lr() == pytest.approx(limit / top / 2, rel=1e-6)
    along = ODEDiagnostics(1)
    fit(LeastSquares(lambda p: SGD(p, lr=0.01)), [(x, y)] * 5, along)
    assert along.suggest_lr() > 1 / top
    with pytest.raises(RuntimeError, match=r"suggest_lr\(\) needs a probe .* train for more than every_n_steps"):
        ODEDiagnostics().suggest_lr()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be 1 or more"),
        ({"sharpness_every_n_steps": 0}, "sharpness_every_n_steps=0 must be 1 or more"),
        ({"sharpness_max_products": 0}, "sharpness_max_products=0 must be 1 or more"),
        ({"tol": 0.0}, "tol=0.0 must be positive"),
        ({"sharpness_rtol": -1.0}, "sharpness_rtol=-1.0 must be positive"),
        ({"on_edge": "raise"}, "on_edge='raise' must be one of log, warn"),
        ({"sharpness_engine": "fd"}, "sharpness_engine='fd' must be one of auto, exact, finite_difference"),
    ],
)
def test_arguments_out_of_range(arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ODEDiagnostics(**arguments)


def test_an_optimizer_that_is_not_there():
    with pytest.raises(ValueError, match=r"optimizer_index=1, but LeastSquares has 1 optimizer\(s\), counted from 0"):
        fit(LeastSquares(lambda p: SGD(p, lr=0.1)), [rows()], ODEDiagnostics(optimizer_index=1))


def test_an_error_gives_the_module_back():
    class Fails(LeastSquares):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise KeyError("batch")
            return super().training_step(batch, batch_idx)

    module, callback = Fails(lambda p: SGD(p, lr=0.1)), ODEDiagnostics(1)
    with pytest.raises(KeyError):
        fit(module, [rows()] * 2, callback)
    assert "training_step" not in module.__dict__
    module.training_step = super(Fails, module).training_step
    fit(module, [rows()] * 2, callback)  # and may be used again
    assert len(callback.history) == 2


def test_a_rate_of_zero_defines_no_solver():
    """The first step of a warm-up: nothing moves, and no row is zero or infinite for it."""
    module = LeastSquares(lambda p: SGD(p, lr=0.0, momentum=0.9))
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, tol=0.1)
    fit(module, [rows()], callback)
    (row,) = callback.history
    assert row["ode/time"] == row["ode/update_norm"] == 0
    assert not names(row) & {"cos_descent", "curvature_step", "edge_ratio_step", "edge_ratio", "sharpness"}


def test_a_frozen_group_does_not_count():
    """A group at rate zero: the rows are those of the other parameters, also for adaptive optimizers."""
    for kind in (SGD, Adam):
        found = []
        for frozen in (lambda p, k=kind: k([{"params": [q], "lr": 0.01 * (q.ndim > 1)} for q in p]), None):
            module = LeastSquares(frozen or (lambda p, k=kind: k([q for q in p if q.requires_grad], lr=0.01)))
            module.b.requires_grad_(frozen is not None)
            callback = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_rtol=1e-10)
            fit(module, [rows()] * 2, callback)
            found.append(callback.history[-1])
        for name in ("edge_ratio_step", "edge_ratio", "sharpness", "update_norm", "curvature_step"):
            assert found[0][f"ode/{name}"] == pytest.approx(found[1][f"ode/{name}"], rel=1e-6), (kind, name)
