"""Metrics that keep float32 or wider in a narrow module, and weights that resume with all their digits."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_plugins.core.full_precision import FullPrecision, FullPrecisionMean, widen

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Counts(FullPrecision):
    """A whole number and a share."""

    def __init__(self):
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("share", torch.tensor(0.5), dist_reduce_fx="sum")

    def update(self):
        self.count += 1

    def compute(self):
        return self.share * self.count


@pytest.mark.parametrize(
    ("cast", "kept"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_states_are_never_narrowed(cast, kept):
    module = nn.ModuleDict({"metric": Counts(), "layer": nn.Linear(2, 2)}).to(cast)
    metric = module["metric"]
    assert module["layer"].weight.dtype == cast
    assert (metric.count.dtype, metric.share.dtype) == (torch.int64, kept)
    metric.reset()  # to its default, which moves with it
    assert (metric.count.dtype, metric.share.dtype) == (torch.int64, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_long_mean_in_half_precision(dtype):
    values = torch.rand(600, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean = FullPrecisionMean().to(dtype)
    for value in values:
        mean.update(value)
    assert mean.compute().dtype == torch.float32
    # 600 sums in float32, each off by half a unit in the last place at most
    assert mean.compute().item() == pytest.approx(values.double().mean().item(), rel=600 * 2**-24)


def test_weights_are_those_of_an_average():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(2, 5, generator=generator), torch.rand(2, 5, generator=generator)
    mean = FullPrecisionMean()
    nn.ModuleList([mean]).to(torch.float64)  # torchmetrics' own double() does nothing
    for value, weight in zip(values, weights, strict=True):
        mean.update(value, weight)
    mean.update(torch.tensor([3.0, 5.0]), weight=2)
    numbers, shares = np.append(values.numpy(), [3, 5]), np.append(weights.numpy(), [2, 2])
    assert mean.compute().item() == pytest.approx(np.average(numbers.astype(float), weights=shares), rel=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_diverged_value_shows(value):
    mean = FullPrecisionMean()
    mean.update(torch.tensor([1.0, value]))
    assert not mean.compute().isfinite()


def test_a_mean_goes_on_outside_of_inference_mode():
    mean = FullPrecisionMean()
    with torch.inference_mode():
        mean.update(torch.tensor(1.0))
        mean.reset()
        mean.update(torch.tensor(2.0))
    mean.update(torch.tensor(4.0))
    assert mean.compute() == 3


class Third(LightningModule):
    """Its weight, a third, has more digits than float32."""

    def __init__(self, widened):
        super().__init__()
        self.widened = widened
        self.weight = nn.Parameter(torch.tensor(0.0))

    def configure_model(self):
        if self.widened:
            widen(self, self._trainer)

    def training_step(self, batch, batch_idx):
        return self.weight * 0

    def train_dataloader(self):
        return DataLoader(torch.zeros(1, 1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_start(self):
        with torch.no_grad():
            if not self.trainer.ckpt_path:
                self.weight.fill_(1 / 3)


@pytest.mark.parametrize("widened", [True, False])
def test_double_weights_resume_with_all_their_digits(tmp_path, widened):
    def run(steps, **options):
        module = Third(widened)
        trainer = Trainer(accelerator="cpu", precision="64-true", max_steps=steps, default_root_dir=tmp_path, **QUIET)
        trainer.fit(module, **options)
        return module, trainer

    _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "third.ckpt")
    resumed, _ = run(2, ckpt_path=tmp_path / "third.ckpt", weights_only=True)
    assert (resumed.weight.item() == 1 / 3) is widened


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_other_precisions_are_left_alone(precision):
    module = Third(True)
    widen(module, Trainer(accelerator="cpu", precision=precision, **QUIET))
    widen(module, None)
    assert module.weight.dtype == torch.float32
