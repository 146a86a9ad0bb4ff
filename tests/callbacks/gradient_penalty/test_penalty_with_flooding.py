"""GradientPenalty and Flooding in one trainer: |L - b| + b + c |grad L|^2 in every order, scope, engine and window."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from toys import WatchedClassifier, mlp, weights
from trainers import fit

from lightning_plugins.callbacks import Flooding, GradientPenalty

C, LEVEL, LR = 0.4, 1.15, 0.3
TOLERANCES = {"exact": 1e-12, "finite_difference": 1e-7}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def net():
    return WatchedClassifier(mlp(4, 6, 3, seed=1), partial(torch.optim.SGD, lr=LR))


class Other(Callback):
    """Of the user, who put it between ours."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([param.grad.flatten() for param in pl_module.parameters()]))


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, 4, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (5, 6), generator=generator), strict=True))


def fit_double(model, *callbacks, **options):
    return fit(model, batches(), *callbacks, precision="64-true", **options)


def squared_gradient(loss, params):
    return sum(grad.square().sum() for grad in torch.autograd.grad(loss, params, create_graph=True))


def written(flooding, penalty, k):
    """The gradients of each step, and the last weights, by autograd; with the signs that occurred."""
    model, signs = net().double(), []
    params = list(model.parameters())
    for start in range(0, 5, k):
        losses = [model.training_step(batch, 0) for batch in batches()[start : start + k]]
        mean = sum(losses) / len(losses)
        floods = losses if flooding == "microbatch" else [mean]
        flooded = sum((loss - LEVEL).abs() + LEVEL for loss in floods) / len(floods)
        signs.append([bool(loss < LEVEL) for loss in floods])
        terms = losses if penalty == "microbatch" else [flooded]  # |grad |l - b|| is |grad l|
        objective = flooded + C * sum(squared_gradient(term, params) for term in terms) / len(terms)
        grads = torch.autograd.grad(objective * len(losses) / k, params)  # Lightning divides by the full k
        model.gradients.append(torch.cat([grad.flatten() for grad in grads]))
        with torch.no_grad():
            for param, grad in zip(params, grads, strict=True):
                param -= LR * grad
    return model, signs


ORDERS = {
    "flooding first": lambda flooding, penalty: [flooding, penalty],
    "penalty first": lambda flooding, penalty: [penalty, flooding],
    "another between": lambda flooding, penalty: [penalty, Other(), flooding],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("engine", ["exact", "finite_difference"])
@pytest.mark.parametrize("penalty_scope", ["step", "microbatch"])
@pytest.mark.parametrize("flooding_scope", ["step", "microbatch"])
def test_gradient(flooding_scope, penalty_scope, engine, k, order):
    expected, _ = written(flooding_scope, penalty_scope, k)
    penalty = GradientPenalty(C, engine=engine, scope=penalty_scope, difference="central")
    model = net()
    both = ORDERS[order](Flooding(LEVEL, scope=flooding_scope), penalty)
    fit_double(model, *both, accumulate_grad_batches=k)
    assert len(model.gradients) == len(expected.gradients)
    for found, right in zip(model.gradients, expected.gradients, strict=True):
        assert (found - right).norm() / right.norm() < TOLERANCES[engine]
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=TOLERANCES[engine])


def test_the_level_is_straddled_and_the_scopes_differ():
    """Else the test above could not tell them apart."""
    runs = {(f, p): written(f, p, 2) for f in ("step", "microbatch") for p in ("step", "microbatch")}
    for (scope, _), (_, signs) in runs.items():
        assert {sign for step in signs for sign in step} == {True, False}, scope
    assert any(len(set(step)) == 2 for step in runs["microbatch", "step"][1])
    found = [weights(model) for model, _ in runs.values()]
    assert all((a - b).norm() > 1e-3 for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize("reverse", [False, True])
def test_others_keep_their_places(reverse):
    """A callback between them sees the flooded gradient without the penalty; one after both, the whole."""
    between, after = Other(), Other()
    ours = [Flooding(LEVEL), GradientPenalty(C, engine="exact", scope="step")]
    first, second = reversed(ours) if reverse else ours
    model = net()
    trainer = fit_double(model, first, between, second, after, accumulate_grad_batches=2)
    assert trainer.callbacks == [ours[0], between, ours[1], after]
    plain = net().double()
    loss = sum(plain.training_step(batch, 0) for batch in batches()[:2]) / 2
    expected = torch.autograd.grad((loss - LEVEL).abs(), list(plain.parameters()))
    torch.testing.assert_close(between.seen[0], torch.cat([grad.flatten() for grad in expected]), rtol=0, atol=1e-12)
    assert (between.seen[0] - after.seen[0]).norm() > 0.1 * between.seen[0].norm()
    assert all(map(torch.equal, after.seen, model.gradients))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("reverse", [False, True])
def test_a_run_resumes_with_its_callbacks_in_another_order(tmp_path, reverse):
    def ours():
        schedule = [[0, 0.5], [8, 2.0]]
        flooding = Flooding(level_schedule=[[0, 1.1], [9, 1.2]], start="step 2")
        return [flooding, GradientPenalty(C, engine="exact", warmup_steps=7, schedule=schedule)]

    whole, resumed = net().double(), net().double()  # else a checkpoint's weights would be rounded on their way back
    saving = {"filename": "{step}", "every_n_train_steps": 5, "save_top_k": -1}
    fit_double(whole, *ours(), ModelCheckpoint(tmp_path, **saving), max_epochs=2)
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    callbacks = ours()[::-1] if reverse else ours()
    callbacks = [callbacks[0], ModelCheckpoint(tmp_path, **saving), Other(), callbacks[1]]
    fit_double(resumed, *callbacks, max_epochs=2, ckpt_path=tmp_path / "step=5.ckpt")
    assert state["global_step"] == len(resumed.gradients) == 5
    assert all(map(torch.equal, whole.gradients[5:], resumed.gradients))
    assert torch.equal(weights(whole), weights(resumed))
