"""SiD leaves out samples that are not finite; NonFiniteGuard ends a run in which none is left."""

import pytest
import torch
from lightning.pytorch import Callback
from trainers import quiet_trainer

from lightning_plugins import NonFiniteGuard
from lightning_plugins.sid.module import SiD


class Spoil(Callback):
    """From a step on the teacher's output is NaN; in the steps of ``rows`` for the first so many samples alone."""

    def __init__(self, start=None, rows=()):
        self.start, self.rows = start, dict(rows)
        self.handle, self.spoilt = None, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch_idx = batch_idx
        if self.handle is None:
            self.handle = pl_module.teacher.denoiser.network.register_forward_hook(self.hook)

    def hook(self, module, inputs, output):
        every = self.start is not None and self.batch_idx >= self.start
        rows = len(output.sample) if every else self.rows.get(self.batch_idx, 0)
        self.spoilt += rows
        output.sample[:rows] = float("nan")


def fit(folder, guard, spoil, **options):
    model = SiD(teacher=str(folder), batch_size=4, num_pictures=0, updates_per_epoch=8, **options)
    quiet_trainer(spoil, guard, max_steps=8).fit(model)
    return model


@pytest.mark.parametrize("policy, accumulate", [("raise", 1), ("skip", 3), ("stop", 1)])
def test_a_teacher_that_turns_nan(teacher_folder, policy, accumulate):
    """It is patient under every policy, and no longer than that."""
    with pytest.raises(FloatingPointError) as raised:
        fit(teacher_folder("ddpm"), NonFiniteGuard(policy, patience=3), Spoil(start=2), accumulate=accumulate)
    text = str(raised.value)
    assert "step 4 in a row to be left out, more than patience=3" in text and "every sample was left out" in text
    assert "(epoch 0, batch 5, rank 0)" in text


def test_samples_that_are_left_out_now_and_then(teacher_folder):
    """A part of each batch, and a whole batch that is followed by a good one."""
    guard = NonFiniteGuard(patience=1)
    spoil = Spoil(rows={1: 3, 2: 4, 4: 4, 5: 2, 6: 4})
    model = fit(teacher_folder("ddpm"), guard, spoil)
    assert spoil.spoilt == 17
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert guard.state_dict() == {"skipped": 0, "in_a_row": 0}
    assert not torch.any(model.left_out_all)
