"""Replays of a training_step: the same loss again, and nothing left behind."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassPrecision, MulticlassRecall
from toys import Squares, mlp
from trainers import fit

import lightning_plugins
from lightning_plugins.core.random_state import get_random_state
from lightning_plugins.replay.module_state import ModuleState
from lightning_plugins.replay.recorder import Call, StepRecorder, is_replaying, without_trace

CPU = torch.device("cpu")


def test_is_replaying_only_inside():
    assert lightning_plugins.is_replaying is is_replaying
    module = nn.Linear(1, 1)
    with without_trace(module, CPU):
        assert is_replaying()
        with without_trace(module, CPU):
            assert is_replaying()
        assert is_replaying()
    with pytest.raises(KeyboardInterrupt), without_trace(module, CPU):
        raise KeyboardInterrupt
    assert not is_replaying()


# What a replay leaves alone


def draw():
    return [
        random.random(),
        random.gauss(0, 1),
        *np.random.rand(2),
        np.random.standard_normal(),
        *torch.rand(2).tolist(),
    ]


def test_random_numbers():
    with without_trace(nn.Linear(1, 1), CPU):
        inside = draw()
    assert draw() == inside != draw()


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4)
        self.register_buffer("written", torch.zeros(3))
        self.register_buffer("reassigned", torch.zeros(3))
        self.register_buffer("late", None)
        self.register_buffer("expanded", torch.zeros(1).expand(3), persistent=False)
        with torch.inference_mode():
            self.register_buffer("inferred", torch.ones(2), persistent=False)

    def forward(self, x):
        self.written += 1
        self.reassigned = self.reassigned + 1
        self.late = torch.ones(2)
        if "new" not in self._buffers:
            self.register_buffer("new", torch.ones(2))
        return self.norm(self.first(x))


def buffers_of(module):
    return {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in all_buffers(module)}


def all_buffers(module):
    return [(f"{where}.{name}", b) for where, part in module.named_modules() for name, b in part._buffers.items()]


def assert_buffers(module, before):
    after = dict(all_buffers(module))
    assert list(after) == list(before)
    for name, (buffer, value) in before.items():
        assert after[name] is buffer, name
        assert buffer is None or torch.equal(buffer, value), name


def test_buffers():
    torch.manual_seed(0)
    module = Stateful()
    before = buffers_of(module)
    with without_trace(module, CPU):
        for _ in range(2):
            module(torch.randn(5, 4)).sum().backward()
        assert module.written.sum() == 6
    assert_buffers(module, before)
    module(torch.randn(5, 4))
    after = buffers_of(module)
    with without_trace(module, CPU):
        module(torch.randn(5, 4))
    assert_buffers(module, after)


def test_buffers_of_a_graph_that_is_still_to_be_differentiated():
    torch.manual_seed(0)
    module, x = nn.BatchNorm1d(3), torch.randn(5, 3)
    module.eval()
    loss = (module(x) ** 2).sum()
    with without_trace(module, CPU):
        module.train()
        module(x)
        module.eval()
    loss.backward()


def test_gradients_and_their_mode():
    module = nn.Linear(2, 1)
    module.weight.grad = gradient = torch.ones(1, 2)
    with torch.no_grad(), without_trace(module, CPU):
        assert module.weight.grad is None
        module(torch.ones(2)).backward()
    assert module.weight.grad is gradient
    assert gradient.tolist() == [[1.0, 1.0]]
    assert module.bias.grad is None


def collection():
    torch.manual_seed(0)
    group = MetricCollection([MulticlassPrecision(3), MulticlassRecall(3)])
    assert group._enable_compute_groups
    return group


def update(group, seed):
    generator = torch.Generator().manual_seed(seed)
    group.update(torch.randint(3, (20,), generator=generator), torch.randint(3, (20,), generator=generator))


@pytest.mark.parametrize("steps_before", [0, 1, 2])
@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("read_inside", [False, True])
def test_metric_collections_and_their_shared_states(steps_before, read_before, read_inside):
    group, expected = collection(), collection()
    for step in range(steps_before):
        for metrics in (group, expected):
            update(metrics, step)
            if read_before:
                metrics.compute(), list(metrics.items())
    with without_trace(group, CPU):
        update(group, 90)
        update(group, 91)
        if read_inside:
            list(group.items())
    for step in (5, 6):
        update(group, step)
        update(expected, step)
        assert [m.update_count for m in group.values()] == [m.update_count for m in expected.values()]
        assert group.compute() == expected.compute()
        assert {name: m.compute() for name, m in group.items()} == expected.compute()


def test_metrics():
    module = nn.ModuleList([MeanMetric(), CatMetric(), MetricTracker(MeanMetric(), maximize=True)])
    mean, cat, tracker = module
    tracker.increment()
    for metric in module:
        metric.update(torch.tensor([1.0, 3.0]))
    assert mean.compute() == 2.0  # which it keeps
    states = mean.mean_value, mean.weight, cat.value
    with without_trace(module, CPU):
        assert mean.compute() == 2.0
        for metric in module:
            metric(torch.tensor([100.0]))
            assert metric.compute().max() > 2.0
        mean.reset()
        cat.reset()
    assert all(a is b for a, b in zip(states, (mean.mean_value, mean.weight, cat.value), strict=True))
    assert cat.compute().tolist() == [1.0, 3.0]
    assert mean.compute() == tracker.compute() == 2.0
    assert mean.update_count == cat.update_count == tracker[-1].update_count == 1
    mean.update(4.0)
    assert mean.compute() == pytest.approx(8 / 3)


# A call


def test_a_call_gives_its_loss_again():
    torch.manual_seed(0)
    module = nn.Sequential(Stateful(), nn.Dropout(0.5))
    x = torch.randn(6, 4)

    def run():
        return (module(x) * random.random() * np.random.rand()).square().mean()

    calls, losses, gradients = [], [], []
    for _ in range(2):
        calls.append(Call(run, CPU, get_random_state(CPU), ModuleState(module)))
        module.zero_grad()
        losses.append(run())
        losses[-1].backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    assert losses[0] != losses[1]
    end, numbers = buffers_of(module), get_random_state(CPU)["torch"]
    with without_trace(module, CPU):
        for index in (0, 1, 1, 0):
            loss = calls[index].replay()
            assert torch.equal(loss, losses[index])
            module.zero_grad()
            loss.backward()
            assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients[index], strict=True))
        calls[0].sign = torch.tensor(-1.0)
        assert torch.equal(calls[0].replay(), -losses[0])
    assert_buffers(module, end)
    assert torch.equal(get_random_state(CPU)["torch"], numbers)


def test_a_call_that_has_no_loss_the_second_time():
    module = nn.Linear(1, 1)
    call = Call(lambda: {"loss": None}, CPU, get_random_state(CPU), ModuleState(module))
    with without_trace(module, CPU), pytest.raises(RuntimeError, match="returned a loss at first, but None when"):
        call.replay()


# The recorder


class Plain(Squares):
    def __init__(self):
        super().__init__(mlp(4, 2, seed=0))
        self.mean = MeanMetric()

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self.net(batch), batch[:, :2])
        self.mean.update(loss)
        self.log("loss", loss)
        self.log_dict({"mean": self.mean}, on_epoch=True)
        return {"loss": loss} if batch_idx % 2 else loss


class Keeps(Callback):
    """Keeps calls, and writes down what the recorder has at each optimizer step."""

    def __init__(self, wanted=True):
        self.wanted, self.losses, self.replayed = wanted, [], []

    def on_train_start(self, trainer, pl_module):
        self.recorder = StepRecorder.attach(trainer, pl_module, self)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.recorder.keep(self, self.wanted)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with without_trace(pl_module, CPU):
            self.replayed.append([call.replay().item() for call in self.recorder.calls])
        self.losses.append([loss.item() for loss in self.recorder.losses])

    def on_train_end(self, trainer, pl_module):
        self.recorder.detach(self)


def trained(module, *callbacks, k=1):
    torch.manual_seed(1)
    return fit(module, [torch.randn(3, 4) for _ in range(5)], *callbacks, accumulate_grad_batches=k)


@pytest.mark.parametrize(("k", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2])])
def test_a_window_holds_the_calls_since_the_last_step(k, sizes):
    keeps = Keeps()
    trainer = trained(Plain(), keeps, k=k)
    assert [len(losses) for losses in keeps.losses] == sizes
    assert keeps.replayed == keeps.losses
    assert trainer.callback_metrics["loss"] == pytest.approx(keeps.losses[-1][-1])
    assert trainer.callback_metrics["mean"] == pytest.approx(np.mean(np.concatenate(keeps.losses)), rel=1e-6)


class Peeks(Callback):
    """Looks at the loss of each batch before and after it is trained on, without gradients."""

    def peek(self, pl_module, batch, batch_idx):
        with torch.no_grad():
            pl_module.training_step(batch + 1, batch_idx)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.peek(pl_module, batch, batch_idx)

    def on_before_backward(self, trainer, pl_module, loss):
        self.peek(pl_module, torch.zeros(3, 4), 0)


@pytest.mark.parametrize("k", [1, 2])
def test_a_step_that_is_only_looked_at_is_not_of_the_window(k):
    alone, watched = Keeps(), Keeps()
    trained(Plain(), alone, k=k)
    trained(Plain(), watched, Peeks(), k=k)
    assert watched.losses == alone.losses
    assert watched.replayed == alone.replayed


def test_losses_are_always_there_and_calls_as_long_as_one_owner_wants_them():
    module, never, always = Plain(), Keeps(wanted=False), Keeps()
    trained(module, never)
    assert never.replayed == [[]] * 5
    assert [len(losses) for losses in never.losses] == [1] * 5
    both = [Keeps(wanted=False), always]
    trained(module, *both)
    assert both[0].recorder is both[1].recorder
    assert both[0].losses == always.losses == always.replayed


def test_the_last_owner_gives_the_training_step_back():
    module = Plain()
    trainer = trained(module)
    one, other = object(), object()
    recorder = StepRecorder.attach(trainer, module, one)
    assert StepRecorder.attach(trainer, module, other) is recorder
    recorder.detach(one)
    recorder.detach(one)
    assert "training_step" in module.__dict__
    recorder.detach(other)
    assert "training_step" not in module.__dict__
    assert StepRecorder.attach(trainer, module, one) is not recorder


def test_a_training_step_of_the_instance_comes_back():
    module = Plain()
    module.training_step = own = module.training_step
    keeps = Keeps()
    trained(module, keeps)
    assert module.__dict__["training_step"] is own
    assert len(keeps.losses) == 5


def test_losses_are_not_the_users_tensors():
    class Edits(Plain):
        def on_before_backward(self, loss):
            with torch.no_grad():
                loss.zero_()

        def training_step(self, batch, batch_idx):
            return self.net(batch).sum().square() + 1.0

    keeps = Keeps()
    trained(Edits(), keeps)
    assert all(loss >= 1.0 for (loss,) in keeps.losses)
    assert keeps.losses == keeps.replayed
