"""FrechetDistance against scipy; its reference file; resets, few images, Lightning's logs."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.utils.data import DataLoader
from toys import Squares
from trainers import quiet_trainer

from lightning_plugins import Digits
from lightning_plugins.metrics import FrechetDistance, feature_extractor
from lightning_plugins.metrics import frechet as frechet_file


def by_scipy(real, fake):
    """The formula in double precision, of the features that vary: scipy's root has no room for others."""
    vary = (real.std(0) > 0) | (fake.std(0) > 0)
    real, fake = real[:, vary].double().numpy(), fake[:, vary].double().numpy()
    mean = ((real.mean(0) - fake.mean(0)) ** 2).sum()
    cov_real, cov_fake = (np.atleast_2d(np.cov(x.T)) for x in (real, fake))
    root = scipy.linalg.sqrtm(cov_real @ cov_fake).real
    return mean + (cov_real + cov_fake - 2 * root).trace()


def rows(count, dim, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + shift


def of_features(real=None, fake=None, **options):
    """The metric after some updates in batches."""
    metric = FrechetDistance(feature=None, **options)
    for part, kind in ((real, True), (fake, False)):
        for batch in () if part is None else part.split(37):
            metric.update(batch, real=kind)
    return metric


@pytest.mark.parametrize(("dim", "shift"), [(1, 0.0), (8, 0.5), (32, 0.1), (32, 1000.0)])
def test_equals_scipy(dim, shift):
    real, fake = rows(300, dim, 1, shift), rows(211, dim, 2, shift) + 0.3
    found = of_features(real, fake, num_features=dim).compute()
    assert found.item() == pytest.approx(by_scipy(real, fake), rel=1e-6)
    assert found.dtype == torch.float32


def test_equal_sets_are_at_distance_zero_and_a_shift_at_its_square():
    real = rows(200, 16, 1)
    assert 0 <= of_features(real, real, num_features=16).compute() < 1e-5
    assert of_features(real, real + 2, num_features=16).compute().item() == pytest.approx(16 * 4, rel=1e-6)


def test_images_go_through_the_extractor():
    data = Digits(image_size=8)
    real, fake = (data.require(split).pixels.float() / 255 for split in ("test", "val"))
    metric = FrechetDistance("digits")
    metric.update(real, real=True)
    metric.update(fake, real=False)
    extractor = feature_extractor("digits")
    assert metric.compute().item() == pytest.approx(by_scipy(extractor(real), extractor(fake)), rel=1e-5)


@pytest.mark.parametrize("forget", [False, True])
def test_reset_keeps_the_real_images_unless_told(forget):
    real, fake = rows(50, 4, 1), rows(60, 4, 2)
    metric = of_features(real, fake, num_features=4, reset_real_features=forget)
    expected = metric.compute()
    with torch.inference_mode():
        metric.reset()
    if forget:
        metric.update(real, real=True)
    metric.update(fake, real=False)  # in place, outside of inference mode
    torch.testing.assert_close(metric.compute(), expected)
    assert metric.real_features_num_samples == 50


def test_a_reference_in_a_file_stands_for_its_images(tmp_path):
    path, real, fake, more = tmp_path / "new" / "reference.pt", rows(90, 4, 1), rows(80, 4, 2), rows(40, 4, 3)
    expected = of_features(real, fake, num_features=4)
    expected.save_reference(path)
    assert [file.name for file in path.parent.iterdir()] == ["reference.pt"]
    metric = of_features(more, fake, num_features=4)
    metric.compute()
    metric.load_reference(path)  # in place of other images
    torch.testing.assert_close(metric.compute(), expected.compute())
    metric.reset()
    metric.update(fake, real=False)
    torch.testing.assert_close(metric.compute(), expected.compute())
    metric.update(more, real=True)  # beside those of the file
    both = of_features(torch.cat([real, more]), fake, num_features=4)
    torch.testing.assert_close(metric.compute(), both.compute())
    metric.save_reference(path)
    metric.load_reference(path)
    torch.testing.assert_close(metric.compute(), both.compute())
    metric.reset_real_features = True
    metric.reset()
    metric.update(fake, real=False)
    with pytest.raises(ValueError, match="needs two real images or more, got 0"):
        metric.compute()


def test_a_reference_of_another_extractor_is_refused(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))
    network.num_features = 4
    metric = FrechetDistance(network)
    metric.update(torch.rand(9, 1, 4, 4), real=True)
    metric.save_reference(tmp_path / "a.pt")
    FrechetDistance(network).load_reference(tmp_path / "a.pt")
    with torch.no_grad():
        network[1].weight[0] = 0
    for other in (FrechetDistance(network), FrechetDistance("digits"), of_features(num_features=4)):
        with pytest.raises(ValueError, match=r"a\.pt holds features of another extractor, .*Sequential \(4 features,"):
            other.load_reference(tmp_path / "a.pt")
    of_features(rows(5, 3, 1), num_features=3).save_reference(tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"features \(3 features\), this metric's is features \(4 features\)"):
        of_features(num_features=4).load_reference(tmp_path / "b.pt")
    torch.save({"state_dict": {}}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt holds no reference"):
        metric.load_reference(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="save_reference needs real images"):
        of_features(num_features=4).save_reference(tmp_path / "d.pt")


def test_a_broken_write_leaves_the_old_reference(tmp_path, monkeypatch):
    path = tmp_path / "reference.pt"
    metric = of_features(rows(9, 3, 1), num_features=3)
    metric.save_reference(path)
    before = path.read_bytes()

    def full_disk(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(frechet_file.torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        metric.save_reference(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["reference.pt"]


def test_too_few_images_are_named():
    with pytest.warns(UserWarning, match="FrechetDistance of 8 generated images in 8 features means little"):
        of_features(rows(9, 8, 1), rows(8, 8, 2), num_features=8).compute()
    with pytest.raises(ValueError, match="needs two generated images or more, got 1"):
        of_features(rows(9, 8, 1), rows(1, 8, 2), num_features=8).compute()


def test_wrong_use_gets_a_sentence():
    for options in ({"feature": None}, {"num_features": 3}):
        with pytest.raises(ValueError, match=r"num_features=.* give one of them"):
            FrechetDistance(**options)
    metric = of_features(num_features=3)
    with pytest.raises(ValueError, match=r"feature=None: update takes floating features \(B, F\), got torch.float32"):
        metric.update(torch.zeros(2, 1, 8, 8), real=True)
    with pytest.raises(ValueError, match="features must be finite"):
        metric.update(torch.full((2, 3), float("inf")), real=True)
    with pytest.raises(ValueError, match="features have 4 columns and num_features=3"):
        metric.update(torch.zeros(2, 4), real=True)
    with pytest.raises(TypeError, match="FrechetDistance has no value of one batch"):
        metric(torch.zeros(2, 3), real=True)


def test_lightning_logs_it_every_epoch():
    class Module(Squares):
        def __init__(self):
            super().__init__(nn.Linear(4, 4))
            self.distance = FrechetDistance("digits")

        def training_step(self, batch, batch_idx):
            return self.loss(torch.ones(4))

        def validation_step(self, batch, batch_idx):
            if not self.distance.real_features_num_samples >= 80:
                self.distance.update(batch, real=True)
            self.distance.update(batch * (0.9 - 0.2 * self.current_epoch), real=False)
            self.log("val/frechet_distance", self.distance)

    module, found = Module(), []
    module.on_validation_end = lambda: found.append(float(module.trainer.callback_metrics["val/frechet_distance"]))
    images = torch.rand(80, 1, 8, 8)
    trainer = quiet_trainer(max_epochs=3, num_sanity_val_steps=0)
    trainer.fit(module, DataLoader(images, batch_size=40), DataLoader(images, batch_size=40))
    assert module.distance.real_features_num_samples == 80
    assert 0 < found[0] < found[1] < found[2]
