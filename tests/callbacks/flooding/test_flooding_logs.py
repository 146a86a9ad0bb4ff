"""What Flooding logs, what it leaves alone, and that it resumes and waits for nothing."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from toys import Regression, mlp, weights
from trainers import fit, quiet_trainer

from lightning_plugins.callbacks.flooding.callback import Flooding

pytestmark = pytest.mark.filterwarnings("ignore:.*exists and is not empty", "ignore:.*does not have many workers")

LEVEL = 0.35


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 4, generator=generator)
    return list(x * torch.linspace(0.2, 1.8, 6)[:, None, None])


def loader():
    return DataLoader(batches(), batch_size=None)


class Net(Regression):
    """Logs its loss and remembers what it returned."""

    def __init__(self, momentum=0.0):
        super().__init__(mlp(4, 8, 1, seed=0), partial(torch.optim.SGD, lr=0.1, momentum=momentum))
        self.returned = []

    def training_step(self, batch, batch_idx):
        loss = self.loss((batch, batch.sum(1, keepdim=True).sin()))
        self.returned.append(loss)
        self.log("train/loss", loss)
        return loss


class Seen(Callback):
    """The sign of every step, and what was logged."""

    def __init__(self):
        self.signs, self.logged = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.signs += [c.sign.item() for c in trainer.callbacks if isinstance(c, Flooding)]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def trained(model, *callbacks, **options):
    seen = Seen()
    fit(model, batches(), *callbacks, seen, **({"max_epochs": 2, "log_every_n_steps": 1} | options))
    model.signs, model.logged = seen.signs, seen.logged
    return model


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_the_users_loss_stays_raw(scope):
    seen = []

    class Outputs(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs["loss"].item() * 2)  # Lightning's is divided by accumulate_grad_batches

    class Values(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            values.append(loss.item())
            return loss

    values = []
    model = trained(Values(), Flooding(1e6, scope), Outputs(), accumulate_grad_batches=2)
    assert [loss.item() for loss in model.returned] == values
    assert seen == values
    assert [logged["train/loss"] for logged in model.logged] == values


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_logs(scope):
    model = trained(
        Net(), Flooding(scope=scope, level_schedule=[[1, 0.5], [3, 0.3]], start="step 1"), accumulate_grad_batches=2
    )
    losses = torch.stack(model.returned).detach().reshape(6, 2)
    levels = torch.tensor([-math.inf, 0.5, 0.4, 0.3, 0.3, 0.3])
    active = (losses.mean(1) < levels).float() if scope == "step" else (losses < levels[:, None]).float().mean(1)
    logged = model.logged[1::2]
    assert [row["flood/level"] for row in logged] == pytest.approx(levels.tolist())
    assert [row["flood/raw_loss"] for row in logged] == pytest.approx(losses.mean(1).tolist())
    assert [row["flood/active"] for row in logged] == active.tolist()
    assert set(active.tolist()) > {0.0}


def test_logs_only_where_the_trainer_does():
    model = trained(Net(), Flooding(LEVEL), log_every_n_steps=3)
    assert ["flood/level" in row for row in model.logged[:3]] == [False, False, True]
    changes = [i for i in range(3, 12) if model.logged[i]["flood/raw_loss"] != model.logged[i - 1]["flood/raw_loss"]]
    assert changes == [5, 8, 11]


def test_where_the_trainer_never_logs():
    model = trained(Net(), Flooding(LEVEL), log_every_n_steps=0)
    assert not any("flood/level" in row for row in model.logged)
    bare = Net()
    bare.log = lambda *args: None
    Trainer(barebones=True, max_epochs=2, accelerator="cpu", callbacks=[Flooding(LEVEL)]).fit(bare, loader())
    assert torch.equal(weights(bare), weights(model))


class Waits(TorchDispatchMode):
    """Counts what makes the processor wait for a device: a number out of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_nothing_waits_for_a_value(scope):
    class Asks(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            bool(next(pl_module.parameters()).sum() > 0)

    counts = []
    for callbacks in ([], [Flooding(LEVEL, scope)], [Asks()]):
        trainer, data = quiet_trainer(*callbacks, max_epochs=2, accumulate_grad_batches=2), loader()
        with Waits() as waits:
            trainer.fit(Net(), data)
        counts.append(waits.count)
    assert counts[1] == counts[0]
    assert counts[2] == counts[0] + 6


def test_resumed_is_uninterrupted(tmp_path):
    def run(ckpt_path=None):
        flooding = Flooding(level_schedule=[[0, 1.0], [12, 0.2]], start="epoch 1")
        checkpoint = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
        options = {"max_epochs": 6, "ckpt_path": ckpt_path}
        return trained(Net(momentum=0.9), flooding, checkpoint, accumulate_grad_batches=2, **options)

    whole = run()
    assert whole.signs[:3] == [1, 1, 1]
    assert set(whole.signs) == {1, -1}
    for step in (3, 9):
        resumed = run(tmp_path / f"step={step}.ckpt")
        assert resumed.signs == whole.signs[step:]
        assert torch.equal(weights(resumed), weights(whole))
