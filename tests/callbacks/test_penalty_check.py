"""The first step's look at whether the finite difference is resolved."""

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_plugins import GradientPenalty


@pytest.mark.parametrize(("scale", "warns"), [(1.0, False), (300.0, True)])
def test_a_loss_that_bends_within_the_step_is_told(scale, warns):
    """Of sines so fast that the automatic step goes around them the finite difference is nonsense."""
    torch.set_num_threads(1)

    class Waves(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(50))

        def training_step(self, batch, batch_idx):
            return torch.sin(scale * 300 * self.weight).sum() / 300**2 + self.weight.square().sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-5)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = Trainer(accelerator="cpu", max_steps=2, callbacks=[GradientPenalty(0.1)], **quiet)
        trainer.fit(Waves(), torch.utils.data.DataLoader([0.0, 0.0]))
    assert warns == any("does not resolve this loss's curvature" in str(warning.message) for warning in told)
