"""Every row against closed forms on quadratics; the order of the flow; clipping."""

import math

import numpy as np
import pytest
import torch
from ode_names import names
from torch.optim import SGD, Adam, AdamW, RMSprop
from toys import LeastSquares, rows
from trainers import fit

from lightning_plugins import ODEDiagnostics
from lightning_plugins.callbacks.ode_diagnostics.rows import clipping
from lightning_plugins.core.vectors import norm

# Closed forms

H_RATE, B, WD, ALPHA, B1, B2, EPS = 0.05, 0.8, 0.1, 0.9, 0.9, 0.99, 1e-8


def loop(name, theta, gradient, steps):
    """The optimizers' equations; yields parameters before and after each step, ``P``, and the flow time."""
    m = v = np.zeros_like(theta)
    time = 0.0
    for t in range(1, steps + 1):
        g, before, P, decay = gradient(theta), theta, np.ones_like(theta), 1.0
        if name == "sgd":
            d, time = -H_RATE * g, time + H_RATE
        elif name == "momentum":
            m = B * m + g
            d, time = -H_RATE * m, time + H_RATE * (1 - B**t) / (1 - B)
        elif name == "nesterov":
            m = B * m + g
            d, time = -H_RATE * (g + B * m), time + H_RATE * (1 - B ** (t + 1)) / (1 - B)
        elif name == "rmsprop":
            v = ALPHA * v + (1 - ALPHA) * g**2
            P = np.sqrt(v) + EPS
            d, time = -H_RATE * g / P, time + H_RATE
        else:
            m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
            P = np.sqrt(v / (1 - B2**t)) + EPS
            decay = 1 - H_RATE * WD if name == "adamw" else 1.0
            d, time = (decay - 1) * theta - H_RATE * m / (1 - B1**t) / P, time + H_RATE
        theta = theta + d
        yield before, theta, P, time


SIX = {
    "sgd": (lambda p: SGD(p, lr=H_RATE), 2),
    "momentum": (lambda p: SGD(p, lr=H_RATE, momentum=B), 2 * (1 + B)),
    "nesterov": (lambda p: SGD(p, lr=H_RATE, momentum=B, nesterov=True), 2 * (1 + B) / (1 + 2 * B)),
    "rmsprop": (lambda p: RMSprop(p, lr=H_RATE, alpha=ALPHA, eps=EPS), 2),
    "adam": (lambda p: Adam(p, lr=H_RATE, betas=(B1, B2), eps=EPS), 2 * (1 + B1) / (1 - B1)),
    "adamw": (
        lambda p: AdamW(p, lr=H_RATE, betas=(B1, B2), eps=EPS, weight_decay=WD),
        (1 + B1) * (2 - H_RATE * WD) / (1 - B1),
    ),
}


@pytest.mark.parametrize("name", SIX)
def test_all_rows_in_closed_form(name):
    optimizer, limit = SIX[name]
    x, y = rows()
    X, Y = x.numpy(), y.numpy()
    hessian = X.T @ X / len(X)

    def loss(theta):
        return ((X @ theta - Y) ** 2).mean() / 2 + 0.25

    def gradient(theta):
        return X.T @ (X @ theta - Y) / len(X)

    module = LeastSquares(optimizer)
    start = module.theta.detach().numpy().copy()
    search = {"sharpness_every_n_steps": 3, "sharpness_rtol": 1e-12}
    callback = ODEDiagnostics(1, tol=0.1, **search)
    fit(module, [(x, y)] * 9, callback)
    assert len(callback.history) == 9
    for step, (row, (theta0, theta1, P, time)) in enumerate(
        zip(callback.history, loop(name, start, gradient, 9), strict=True)
    ):
        g0, g1, d = gradient(theta0), gradient(theta1), theta1 - theta0
        length, slope, bend = np.linalg.norm(d), g0 @ d, d @ hessian @ d
        edge_step = H_RATE * bend / (d @ (P * d)) / limit
        expected = {
            "time": time,
            "grad_norm": np.linalg.norm(g0),
            "update_norm": length,
            "rel_update": length / np.linalg.norm(theta0),
            "cos_descent": -slope / length / np.linalg.norm(g0),
            "effective_lr": -slope / (g0 @ g0),
            "predicted_dloss": slope,
            "clip_factor": 1,
            "skipped_steps": 0,
            "loss": loss(theta0),
            "predicted2_dloss": d @ (g0 + g1) / 2,
            "actual_dloss": loss(theta1) - loss(theta0),
            "dloss_ratio": (loss(theta1) - loss(theta0)) / slope,
            "curvature_step": bend / length**2,
            "edge_ratio_step": edge_step,
        }
        if name in ("sgd", "rmsprop"):
            error = H_RATE / 2 * np.linalg.norm((g1 - g0) / P)
            if name == "sgd":  # the second form of the same
                assert error == pytest.approx(H_RATE**2 / 2 * np.linalg.norm(hessian @ g0), rel=1e-9)
            expected |= {"local_error": error, "rel_local_error": error / length}
            expected["lr_for_tol"] = H_RATE * 0.1 * length / error
        phi = {
            "sgd": H_RATE / 4,
            "momentum": H_RATE * (1 + B) / 4 / (1 - B) ** 2,
            "nesterov": H_RATE * (1 - B + 2 * B**2) / 4 / (1 - B) ** 2,
        }
        if name in phi:
            term = phi[name] * (g0 @ g0)
            expected |= {"igr_term": term, "igr_ratio": term / loss(theta0)}
        searched = {}
        if step % 3 == 2:
            top = np.linalg.eigvalsh(hessian / np.sqrt(P)[:, None] / np.sqrt(P))[-1]
            searched = {"sharpness": top, "edge_ratio": H_RATE * top / limit}
            searched["stiffness"] = H_RATE * top / limit / abs(edge_step)
            if name == "momentum":
                searched["damping_ratio"] = (1 - B) / 2 / math.sqrt(H_RATE * top)
        assert names(row) == expected.keys() | searched.keys()
        for key, value in expected.items():
            assert row[f"ode/{key}"] == pytest.approx(value, rel=1e-10), key
        for key, value in searched.items():
            assert row[f"ode/{key}"] == pytest.approx(value, rel=1e-8), key


def test_coupled_decay_belongs_to_the_objective():
    """Rows of the loss are of the loss; those of the solver of the loss plus decay."""
    x, y = rows()
    hessian = (x.T @ x / len(x)).numpy()
    module = LeastSquares(lambda p: SGD(p, lr=0.05, weight_decay=0.3))
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_rtol=1e-12)
    before = module.theta.detach().numpy().copy()
    fit(module, [(x, y)], callback)
    row = callback.history[0]
    d = module.theta.detach().numpy() - before
    gradient = (x.T @ (x @ torch.as_tensor(before) - y) / len(x)).numpy()
    with_decay = hessian + 0.3 * np.eye(5)
    assert row["ode/grad_norm"] == pytest.approx(np.linalg.norm(gradient))
    assert row["ode/curvature_step"] == pytest.approx(d @ hessian @ d / (d @ d))
    assert row["ode/edge_ratio_step"] == pytest.approx(0.05 * d @ with_decay @ d / (d @ d) / 2)
    assert row["ode/edge_ratio"] == pytest.approx(0.05 * np.linalg.eigvalsh(with_decay)[-1] / 2)
    assert row["ode/local_error"] == pytest.approx(0.05 / 2 * np.linalg.norm(with_decay @ d))
    assert row["ode/igr_term"] == pytest.approx(0.05 / 4 * np.sum((gradient + 0.3 * before) ** 2))


def test_rates_of_groups():
    """A group with a tenth of the rate: exact in the metric of the rates."""
    x, y = rows()
    hessian = (x.T @ x / len(x)).numpy()
    module = LeastSquares(lambda p: SGD([{"params": [q], "lr": 0.05 / 10**i} for i, q in enumerate(p)]))
    callback = ODEDiagnostics(1, sharpness_every_n_steps=1, sharpness_rtol=1e-12)
    before = module.theta.detach().numpy().copy()
    fit(module, [(x, y)], callback)
    row, rates = callback.history[0], np.array([0.05] * 4 + [0.005])
    d = module.theta.detach().numpy() - before
    top = np.linalg.eigvalsh(np.sqrt(rates)[:, None] * hessian * np.sqrt(rates))[-1]
    gradient = (x.T @ (x @ torch.as_tensor(before) - y) / len(x)).numpy()
    np.testing.assert_allclose(d, -rates * gradient, rtol=1e-12)
    assert row["ode/edge_ratio"] == pytest.approx(top / 2)
    assert row["ode/sharpness"] == pytest.approx(top / 0.05)
    assert row["ode/edge_ratio_step"] == pytest.approx(d @ hessian @ d / (d @ (d / rates)) / 2)
    assert row["ode/local_error"] == pytest.approx(np.linalg.norm(rates * (hessian @ d)) / 2)
    assert row["ode/igr_term"] == pytest.approx(np.sum(rates * gradient**2) / 4)
    assert row["ode/time"] == 0.05


@pytest.mark.parametrize("kind", [SGD, Adam])
def test_maximize_is_descent_of_the_negative_loss(kind):
    """All rows of the solver equal those of a run on minus the loss; rows of the loss change their sign."""

    class Negative(LeastSquares):
        def training_step(self, batch, batch_idx):
            return -super().training_step(batch, batch_idx)

    found = []
    for module in (LeastSquares(lambda p: kind(p, lr=0.01, maximize=True)), Negative(lambda p: kind(p, lr=0.01))):
        callback = ODEDiagnostics(2, sharpness_every_n_steps=2, tol=0.1, sharpness_rtol=1e-12)
        fit(module, [rows()] * 4, callback)
        found.append(callback.history)
    for climb, fall in zip(*found, strict=True):
        assert names(climb) - {"igr_ratio"} == names(fall)
        for name in names(fall):
            sign = (
                -1 if name in ("loss", "predicted_dloss", "predicted2_dloss", "actual_dloss", "curvature_step") else 1
            )
            assert climb[f"ode/{name}"] == pytest.approx(sign * fall[f"ode/{name}"], rel=1e-7), name
        assert climb["ode/cos_descent"] > 0


# Flow order


def flow(matrix, time, start):
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ (np.exp(-values * time) * (vectors.T @ start))


def test_the_local_error_is_eulers():
    """Its ratio to the distance from the flow after one step tends to one, linearly in the rate."""
    x, y = rows()
    x, y = x, torch.zeros_like(y)  # the minimum at zero
    hessian = (x.T @ x / len(x)).numpy()
    ratios = []
    for lr in (1e-1, 1e-2, 1e-3):
        module = LeastSquares(lambda p, lr=lr: SGD(p, lr=lr))
        start = module.theta.detach().numpy().copy()
        callback = ODEDiagnostics(1)
        fit(module, [(x, y)], callback)
        true = np.linalg.norm(module.theta.detach().numpy() - flow(hessian, lr, start))
        ratios.append(callback.history[0]["ode/local_error"] / true - 1)
    assert ratios[2] < 0.005
    assert ratios[1] / ratios[2] == pytest.approx(10, rel=0.2)


def test_order_of_the_flow_and_of_the_modified_flow():
    """At ``ode/time``: first order from the flow of L, second from that of L plus the implicit term."""
    x, y = rows()
    x, y = x, torch.zeros_like(y)
    hessian = (x.T @ x / len(x)).numpy()
    plain, modified = [], []
    for steps in (8, 16, 32, 64):
        module = LeastSquares(lambda p, n=steps: SGD(p, lr=0.4 / n))
        start = module.theta.detach().numpy().copy()
        callback = ODEDiagnostics(steps)
        fit(module, [(x, y)] * steps, callback)
        (row,) = callback.history
        assert row["ode/time"] == pytest.approx(0.4)
        phi = row["ode/igr_term"] / row["ode/grad_norm"] ** 2
        end = module.theta.detach().numpy()
        plain.append(np.linalg.norm(end - flow(hessian, row["ode/time"], start)))
        modified.append(np.linalg.norm(end - flow(hessian + 2 * phi * hessian @ hessian, row["ode/time"], start)))
    assert np.log2(plain[-2] / plain[-1]) == pytest.approx(1, abs=0.1)
    assert np.log2(modified[-2] / modified[-1]) == pytest.approx(2, abs=0.1)


# Clipping


def test_norm_clipping_shortens_the_euler_step():
    x, y = rows()
    module = LeastSquares(lambda p: SGD(p, lr=0.1))
    before = module.theta.detach().numpy().copy()
    callback = ODEDiagnostics(1, tol=0.1)
    fit(module, [(x, y)], callback, gradient_clip_val=0.5)
    row, hessian = callback.history[0], (x.T @ x / len(x)).numpy()
    gradient = (x.T @ (x @ torch.as_tensor(before) - y) / len(x)).numpy()
    factor = 0.5 / np.linalg.norm(gradient)
    assert row["ode/clip_factor"] == pytest.approx(factor, rel=1e-5)
    assert row["ode/grad_norm"] == pytest.approx(np.linalg.norm(gradient))
    short = 0.1 * row["ode/clip_factor"]
    assert row["ode/local_error"] == pytest.approx(short**2 / 2 * np.linalg.norm(hessian @ gradient))
    bend = gradient @ hessian @ gradient / (gradient @ gradient)
    assert row["ode/edge_ratio_step"] == pytest.approx(0.1 * bend / 2)
    assert not names(row) & {"igr_term", "igr_ratio"}


def test_value_clipping_bends_the_step_so_that_there_is_no_local_error():
    callback = ODEDiagnostics(1, tol=0.1)
    fit(
        LeastSquares(lambda p: SGD(p, lr=0.1)),
        [rows()],
        callback,
        gradient_clip_val=0.5,
        gradient_clip_algorithm="value",
    )
    assert callback.history[0]["ode/clip_factor"] < 1
    assert not names(callback.history[0]) & {"igr_term", "igr_ratio", "local_error", "rel_local_error", "lr_for_tol"}
    assert "edge_ratio_step" in names(callback.history[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_long_gradient_is_not_turned_by_rounding(dtype):
    """Neither one that is left alone nor one that is shortened; one with a few values cut off is."""
    for seed in range(3):
        gradient = torch.randn(300_000, generator=torch.Generator().manual_seed(seed)).to(dtype)
        length = norm([gradient]).item()
        assert clipping([gradient], length, [gradient.clone()]) == (1.0, False)
        factor, turned = clipping([gradient], length, [gradient * 0.01])
        assert (factor, turned) == (pytest.approx(0.01, rel=1e-2), False)
        assert clipping([gradient], length, [gradient.clamp(-1, 1)])[1]
