"""GenerativeEvaluation on a tiny module: figures of the metrics themselves, training untouched, and on two processes.

The file is also the script that torchrun starts: ``torchrun --nproc_per_node 2 test_generative_evaluation.py FOLDER``.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins import Digits
from lightning_plugins.callbacks.generative_evaluation.callback import GenerativeEvaluation
from lightning_plugins.metrics.birthday import BirthdayParadox
from lightning_plugins.metrics.extractors import feature_extractor
from lightning_plugins.metrics.frechet import FrechetDistance
from lightning_plugins.metrics.precision_recall import PrecisionRecallDensityCoverage

NAMES = ("frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "support_size")


class Painter(LightningModule):
    """Learns the mean image of each class and samples it with noise; training draws global random numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mean = nn.Parameter(torch.rand(10, 1, 8, 8))

    def training_step(self, batch, batch_idx):
        return F.mse_loss(F.dropout(self.mean[batch["label"]], 0.1), batch["image"])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.mse_loss(self.mean[batch["label"]], batch["image"]))

    def test_step(self, batch, batch_idx):
        pass

    def sample(self, num_samples, *, generator=None, noise=0.01):
        labels = torch.randint(10, (num_samples,), generator=generator, device=self.device)
        images = self.mean[labels]
        return (images + noise * torch.randn(images.shape, generator=generator, device=self.device)).clamp(0, 1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Blind(Painter):
    """Takes batches of any form."""

    def validation_step(self, batch, batch_idx):
        pass


class Global(Painter):
    """Samples as many modules do: with global random numbers, of all three kinds."""

    def sample(self, num_samples):
        labels = [random.randrange(10) for _ in range(num_samples)]
        noise = torch.from_numpy(np.random.randn(num_samples, 1, 8, 8)).float() / 100 + torch.rand(1) / 100
        return (self.mean[labels] + noise).clamp(0, 1)


def digits(**options):
    return Digits(image_size=8, batch_size=64, **options)


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, callbacks=[*callbacks], **{**quiet, **options})


def evaluation(**options):
    return GenerativeEvaluation(**{"num_samples": 300, "batch_size": 128, "reference": "train", **options})


def values(run, stage="val"):
    return {name: run.callback_metrics[f"{stage}/{name}"].item() for name in NAMES}


def test_figures_are_those_of_the_metrics_and_pictures_are_drawn(tmp_path):
    run = trainer(evaluation(), logger=CSVLogger(tmp_path, name="", version="run"))
    module, data = Painter(), digits()
    run.validate(module, data, verbose=False)
    extractor = feature_extractor("digits")
    expected = {}
    frechet, nearest, birthday = FrechetDistance("digits"), PrecisionRecallDensityCoverage("digits"), BirthdayParadox()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for metric in (frechet, nearest, birthday):
            for batch in data.train_dataloader():
                metric.update(batch["image"], real=True)
        samples = torch.cat([module.sample(num, generator=generator) for num in (128, 128, 44)])
        for metric in (frechet, nearest, birthday):
            metric.update(samples, real=False)
    expected = {"frechet_distance": frechet.compute(), **nearest.compute(), **birthday.compute()}
    found = values(run)
    for name in set(NAMES) - {"kernel_distance"}:
        assert found[name] == pytest.approx(expected[name].item(), rel=1e-4), name
    folder = tmp_path / "run"
    table = (folder / "tables" / "val" / "generative" / "000000.csv").read_text().split()
    assert table[:2] == ["figure,value", "num_samples,300"] and len(table) == 2 + 15
    grid = Image.open(folder / "images" / "val" / "generated" / "000000.png")
    assert grid.size == (8 * 33 - 1, 8 * 33 - 1)  # 8 x 8 images of 8 px, four times as large, with lines
    assert grid.getpixel((0, 0)) == pytest.approx(255 * samples[0, 0, 0, 0].item(), abs=1)
    pairs = Image.open(folder / "images" / "val" / "closest_pairs" / "000000.png")
    assert pairs.size == (12 * 33 - 1, 2 * 33 - 1)
    first, second = (samples[index, 0, 0, 0].item() * 255 for index in birthday.closest_pairs(12)[1][0])
    assert (pairs.getpixel((0, 0)), pairs.getpixel((0, 33))) == pytest.approx((first, second), abs=1)
    assert not any("extractor" in name or "network" in name for name in module.state_dict())
    assert extractor.num_features == 32


@pytest.mark.parametrize("loaders", ["data module", "plain"])
def test_training_is_untouched_bit_for_bit(loaders):
    """Also where the loader that is read draws from torch's global random state."""

    def fit(*callbacks):
        torch.manual_seed(1)
        module, run = Painter(), trainer(*callbacks, max_epochs=3, num_sanity_val_steps=2)
        if loaders == "plain":
            data = digits().images("train")
            rows = [{"image": x.float() / 255, "label": y} for x, y in zip(data.pixels, data.labels, strict=True)][:200]
            run.fit(module, DataLoader(rows, 50, shuffle=True, num_workers=0), DataLoader(rows, 50))
        else:
            run.fit(module, digits())
        return module.mean.detach(), torch.rand(3), run

    *plain, _ = fit()
    *watched, run = fit(evaluation(reference="val", metrics=["frechet", "kernel", "precision_recall"]))
    assert run.callback_metrics["val/frechet_distance"] > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


class Counting(Digits):
    """Notes how often each loader is made."""

    made = 0

    def train_dataloader(self):
        self.made += 1
        return super().train_dataloader()


def test_cadence_cache_monitors_and_the_sanity_check(tmp_path):
    seen = []

    class Watched(Painter):
        def sample(self, num_samples, **options):
            assert not self.training
            seen.append((self.trainer.current_epoch, self.trainer.sanity_checking))
            return super().sample(num_samples, **options)

    best = ModelCheckpoint(tmp_path, monitor="val/frechet_distance", every_n_epochs=2, filename="{epoch}")
    stop = EarlyStopping("val/support_size", mode="max", patience=100, strict=False)
    data = Counting(image_size=8, batch_size=64)
    run = trainer(evaluation(every_n_epochs=2), best, stop, max_epochs=4, enable_checkpointing=True)
    run.fit(Watched(), data)
    assert set(seen) == {(1, False), (3, False)} and len(seen) == 2 * 3
    assert data.made == 2  # for training, and once for the evaluation
    assert best.best_model_path.endswith("epoch=3.ckpt")  # its images have come closer to digits
    assert best.best_model_score == run.callback_metrics["val/frechet_distance"]
    run.test(Watched.load_from_checkpoint(best.best_model_path), data, verbose=False)
    assert values(run, "test")["frechet_distance"] == pytest.approx(float(best.best_model_score), rel=1e-5)


def test_references(tmp_path):
    """A file gives what its split gives; plain loaders serve validation; sample_options reach the module."""
    data = digits()
    frechet = FrechetDistance("digits")
    for batch in data.val_dataloader():
        frechet.update(batch["image"], real=True)
    frechet.save_reference(tmp_path / "val.pt")
    found = {}
    plain = DataLoader(TensorDataset(torch.cat([batch["image"] for batch in data.val_dataloader()])), 64)

    for name, reference, source in (
        ("split", "val", data),
        ("file", str(tmp_path / "val.pt"), data),
        ("loader", "val", plain),
    ):
        run = trainer(evaluation(reference=reference, metrics=["frechet"]))
        given = {"datamodule": source} if source is data else {"dataloaders": source}
        run.validate(Blind(), **given, verbose=False)
        found[name] = run.callback_metrics["val/frechet_distance"].item()
    assert found["file"] == pytest.approx(found["split"], rel=1e-6)
    assert found["loader"] == pytest.approx(found["split"], rel=1e-6)
    run = trainer(evaluation(metrics=["frechet"], reference="val", sample_options={"noise": 0.5}))
    run.validate(Painter(), data, verbose=False)
    assert run.callback_metrics["val/frechet_distance"] < 0.95 * found["split"]


class Prepared(LightningDataModule):
    """Has a split only after the setup of its stage, as most data modules."""

    def setup(self, stage):
        images = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        setattr(self, stage, TensorDataset(images, torch.arange(120)))

    def val_dataloader(self):
        return DataLoader(self.validate, 50, shuffle=True)

    def test_dataloader(self):
        return DataLoader(self.test, 50)


def test_a_split_of_another_stage_is_set_up():
    run = trainer(evaluation(reference="val", metrics=["frechet"]))
    run.test(Painter(), Prepared(), verbose=False)
    assert run.callback_metrics["test/frechet_distance"] > 0


class Silent(LightningModule):
    def validation_step(self, batch, batch_idx):
        pass


def test_refusals():
    for options, words in (
        ({"every_n_epochs": 0}, "every_n_epochs=0 must be 1 or more"),
        ({"num_samples": 1}, "num_samples=1 must be 2 or more"),
        (
            {"metrics": ["fid"]},
            r"metrics=\['fid'\] must be a list of metrics, each one of frechet, kernel",
        ),
        ({"metrics": []}, r"metrics=\[\] must be a list of metrics"),
        ({"reference": "valid"}, r"reference='valid' is taken for a file.*or metrics=\[\"frechet\"\]"),
        ({"reference": "valid", "metrics": ["frechet"]}, 'must be "train", "val", "test" or a file'),
    ):
        with pytest.raises(ValueError, match=words):
            GenerativeEvaluation(**options)
    data = digits()
    loader = data.val_dataloader()

    def validate(module, loaders=loader, **options):
        run = trainer(evaluation(**{"metrics": ["frechet"], **options}))
        run.validate(module, dataloaders=loaders, verbose=False)

    with pytest.raises(MisconfigurationException, match=r"sample\(num_samples.*which Silent lacks"):
        validate(Silent())
    with pytest.raises(MisconfigurationException, match=r"sample_options={'prior': 'x'}.*unexpected keyword argument"):
        validate(Painter(), sample_options={"prior": "x"})
    with pytest.raises(MisconfigurationException, match='reference="train" needs a data module'):
        validate(Painter())
    with pytest.raises(MisconfigurationException, match="reference='test' needs a test loader, and this run has none"):
        validate(Painter(), reference="test")

    class Few(Painter):
        def sample(self, num_samples, *, generator=None):
            return self.mean

    with pytest.raises(MisconfigurationException, match=r"Few.sample\(128\) must return 128 images.*got \(10, 1, 8, 8"):
        validate(Few(), reference="val")
    with pytest.raises(MisconfigurationException, match="got a dict with x"):
        validate(Blind(), DataLoader([{"x": 1}]), reference="val")


def test_a_module_without_a_generator_is_seeded_around_the_call():
    """The same figures each time, other samples in each call, and training that is none the wiser."""
    found, calls = [], []

    class Told(Global):
        def sample(self, num_samples):
            calls.append(super().sample(num_samples))
            return calls[-1]

    for seed in (0, 0, 1):
        run = trainer(evaluation(seed=seed))
        torch.manual_seed(seed + 5), np.random.seed(seed), random.seed(seed)
        run.validate(Told(), digits(), verbose=False)
        found.append([*values(run).values()])
    assert found[0] == found[1] != found[2]
    assert len(calls) == 9 and not torch.equal(calls[0], calls[1])
    assert all(torch.equal(a, b) for a, b in zip(calls[:3], calls[3:6], strict=True))
    weights = []
    for callbacks in ([], [evaluation()]):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        module = Global()
        trainer(*callbacks, max_epochs=2, num_sanity_val_steps=0).fit(module, digits())
        weights.append([module.mean, torch.rand(3), torch.from_numpy(np.random.rand(3)), torch.tensor(random.random())])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# Two processes


def run_alone(folder):
    """Evaluate on this process's share and save what the metrics say and hold."""
    found = {}
    for name, data in (("keys", digits()), ("plain", Prepared())):
        callback = evaluation(num_samples=151, reference="train" if name == "keys" else "val", batch_size=70)
        if name == "plain":
            callback.metrics = ("frechet", "kernel", "precision_recall")
        rows = []
        original = callback._update

        def update(judges, images, real, original=original, rows=rows):
            rows.append((real, images.clone()))
            original(judges, images, real)

        callback._update = update
        run = trainer(callback, devices=int(os.environ.get("WORLD_SIZE", "1")), logger=CSVLogger(folder / name))
        module = Blind()
        torch.manual_seed(run.global_rank)  # as after training on batches of their own
        run.validate(module, data, verbose=False)
        found[name] = {
            "values": {key: value.item() for key, value in run.callback_metrics.items()},
            "real": torch.cat([images for real, images in rows if real]),
            "fake": torch.cat([images for real, images in rows if not real]),
        }
    torch.save(found, folder / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    from lightning_plugins.core.distributed import close_process_group_at_exit

    close_process_group_at_exit()
    torch.set_num_threads(1)
    run_alone(Path(sys.argv[1]))


@pytest.mark.ddp
def test_two_processes_have_the_figures_of_all_their_images(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [*launch, tmp_path], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert answer.returncode == 0, answer.stderr[-5000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, num_real in (("keys", 1216), ("plain", 120)):
        found = [rank[name] for rank in ranks]
        assert found[0]["values"] == found[1]["values"]
        assert [len(rank["fake"]) for rank in found] == [76, 75]
        real, fake = (torch.cat([rank[kind] for rank in found]) for kind in ("real", "fake"))
        assert len(real.flatten(1).unique(dim=0)) == len(real) == num_real or name == "keys"
        assert abs(len(real) - num_real) <= 64
        assert len(fake.flatten(1).unique(dim=0)) == 151
        metrics = [FrechetDistance("digits"), PrecisionRecallDensityCoverage("digits")]
        metrics += [BirthdayParadox("digits")] * (name == "keys")
        expected = {}
        for metric in metrics:
            metric.update(real, real=True)
            metric.update(fake, real=False)
            value = metric.compute()
            expected |= value if isinstance(value, dict) else {"frechet_distance": value}
        for key in {key.removeprefix("val/") for key in found[0]["values"]} - {"kernel_distance"}:
            assert found[0]["values"][f"val/{key}"] == pytest.approx(expected[key].item(), rel=1e-4), key
    assert len(list((tmp_path / "keys").rglob("*.png"))) == 2


def test_a_figure_that_few_images_do_not_give_is_left_out_and_told(tmp_path):
    """Eighty real images: no pair of 3,160 at 1e-4. Training goes on, and the other figures are logged each time."""
    run = trainer(evaluation(), max_epochs=2, num_sanity_val_steps=0, limit_train_batches=1)
    with pytest.warns(UserWarning, match=r"leaves out metrics='birthday': .*give at least 101") as warned:
        run.fit(Painter(), digits(num_train=80))
    assert sum("leaves out" in str(warning.message) for warning in warned) == 1
    assert {name for name in NAMES if f"val/{name}" in run.callback_metrics} == {*NAMES} - {"support_size"}
