"""A teacher that follows by running means inside training_step: frozen parameters that a replay must not move again."""

import copy

import pytest
import torch
from torch import nn
from toys import Squares, mlp
from trainers import fit

from lightning_plugins import GradientPenalty, ODEDiagnostics


class Student(Squares):
    """Follows its teacher on noise; moves it through ``.data``, which torch does not count as writing."""

    def __init__(self):
        super().__init__(mlp(4, 8, 3, seed=0))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        nn.init.normal_(self.teacher[2].bias)

    def training_step(self, batch, batch_idx):
        for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.1)
        return (self.net(batch) - self.teacher(batch)).square().mean()


def train(*callbacks, accumulate=1):
    module, rows = Student(), torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    fit(module, list(rows.split(4)), *callbacks, max_epochs=2, accumulate_grad_batches=accumulate)
    return module.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("callback", [lambda: GradientPenalty(1e-40), lambda: ODEDiagnostics(1)])
def test_a_teacher_moves_as_without(callback, accumulate):
    plain = train(accumulate=accumulate)
    torch.testing.assert_close(train(callback(), accumulate=accumulate), plain, rtol=0, atol=0)
    moved = train(GradientPenalty(0.3), accumulate=accumulate)
    assert not torch.equal(moved["net.0.weight"], plain["net.0.weight"])


def test_many_frozen_parameters_are_not_saved_and_must_not_be_written_to(monkeypatch):
    monkeypatch.setattr("lightning_plugins.replay.module_state._LEAST", 10)
    monkeypatch.setattr("lightning_plugins.replay.module_state._TIMES", 0)
    with pytest.raises(RuntimeError, match=r"writes to parameters that are not trained.* in on_train_batch_end"):
        train(GradientPenalty(0.3))
