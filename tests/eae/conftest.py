"""Small runs of EAE: images of 8 x 8 px, networks of 16 units, codes of four dimensions."""

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_plugins import EAE

SMALL = {"image_shape": (1, 8, 8), "num_classes": 4, "latent_dim": 4, "network": "mlp", "width": 16, "lr": 1e-2}


@pytest.fixture(autouse=True)
def one_thread(clean_process):
    torch.set_num_threads(1)  # small tensors


def images(count=48, seed=0):
    """Noise with a bright square whose place is the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    pixels = 0.6 * torch.rand(count, 1, 8, 8, generator=generator)
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 0.4
    return [{"image": image, "label": label} for image, label in zip(pixels, labels, strict=True)]


@pytest.fixture
def loader():
    """Batches as the data modules give them, in the same order each time."""

    def make(batch_size=16, count=48, seed=0):
        return DataLoader(images(count, seed), batch_size=batch_size)

    return make


@pytest.fixture
def batch(loader):
    return next(iter(loader(32)))


@pytest.fixture
def small():
    """The module, from the same weights each time."""

    def make(cls=EAE, **arguments):
        torch.manual_seed(0)
        return cls(**(SMALL | {"pictures_every_n_epochs": 0} | arguments))

    return make


@pytest.fixture
def trainer(tmp_path):
    few = {"max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return partial(quiet_trainer, default_root_dir=tmp_path, **few)
