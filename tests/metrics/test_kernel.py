"""KernelDistance against the closed formula of the unbiased squared discrepancy."""

import numpy as np
import pytest
import torch

from lightning_plugins.metrics import KernelDistance, feature_extractor


def closed_form(x, y):
    """Unbiased squared maximum mean discrepancy under the cubic kernel, sets of any sizes."""
    x, y = x.double().numpy(), y.double().numpy()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        gram = kernel(a, a)
        return (gram.sum() - np.trace(gram)) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def of_features(real, fake, **options):
    metric = KernelDistance(feature=None, **options)
    for part, kind in ((real, True), (fake, False)):
        for batch in part.split(23):
            metric.update(batch, real=kind)
    return metric


@pytest.mark.parametrize("dim", [1, 7])
def test_all_images_in_one_subset_give_the_closed_form(dim):
    real, fake = torch.randn(60, dim), torch.randn(60, dim) + 0.5
    assert of_features(real, fake).compute().item() == pytest.approx(closed_form(real, fake), rel=1e-5)


def test_subsets_are_means_of_the_whole():
    torch.manual_seed(0)
    real, fake = torch.randn(150, 4), torch.randn(90, 4) + 1
    state = torch.get_rng_state()
    metric = of_features(real, fake, subset_size=40, num_subsets=400)
    found = metric.compute()
    assert torch.equal(torch.get_rng_state(), state)
    assert found.item() == pytest.approx(closed_form(real, fake), rel=0.05)
    metric._computed = None
    assert torch.equal(metric.compute(), found)
    other = of_features(real, fake, subset_size=40, num_subsets=400, seed=1).compute()
    assert other != found and other.item() == pytest.approx(found.item(), rel=0.1)


def test_images_and_resets():
    real, fake = torch.rand(30, 1, 8, 8), torch.rand(30, 1, 8, 8) ** 2
    metric, extractor = KernelDistance("digits"), feature_extractor("digits")
    metric.update(real, real=True)
    metric.update(fake, real=False)
    expected = closed_form(extractor(real), extractor(fake))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-5)
    metric.reset()
    metric.update(fake.flip(0), real=False)
    assert metric.compute().item() == pytest.approx(expected, rel=1e-5)
    metric.reset_real_features = True
    metric.reset()
    metric.update(fake, real=False)
    with pytest.raises(ValueError, match="KernelDistance needs two images or more of each kind, got 0 real and 30"):
        metric.compute()


def test_wrong_use_gets_a_sentence():
    with pytest.raises(ValueError, match="subset_size=1 must be 2 or more"):
        KernelDistance(subset_size=1)
    with pytest.raises(ValueError, match="num_subsets=0 must be 1 or more"):
        KernelDistance(num_subsets=0)
    metric = of_features(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="features have 3 columns and had 2 before"):
        metric.update(torch.zeros(2, 3), real=True)
