import copy
import pickle

import pytest
import torch

from lightning_plugins.eae.entropy import entropy_gap, knn_entropy
from lightning_plugins.eae.entropy_metric import KNNEntropy


def draw(n, d):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def test_metric_is_of_all_updates():
    z = draw(700, 4)
    for metric in (KNNEntropy(k=[1, 2]), pickle.loads(pickle.dumps(KNNEntropy(k=[1, 2])))):
        for batch in z.split([300, 1, 399]):
            metric.update(batch)
        torch.testing.assert_close(metric.compute(), knn_entropy(z, [1, 2]))
    gap = KNNEntropy(gap=True)
    gap.update(z.bfloat16())
    torch.testing.assert_close(gap.compute(), entropy_gap(z.bfloat16()))


def test_forward_gives_the_batch_and_keeps_the_sum():
    z = draw(200, 3)
    metric = KNNEntropy()
    torch.testing.assert_close(metric(z[:100]), knn_entropy(z[:100]))
    torch.testing.assert_close(metric(z[100:]), knn_entropy(z[100:]))
    torch.testing.assert_close(metric.compute(), knn_entropy(z))


def test_a_random_subset_of_many():
    """A stream sorted by class: each part keeps its share, whether in large batches or small ones."""
    z = torch.arange(4000.0)[:, None].repeat(1, 2) + 0.3 * draw(4000, 2)
    for size in (16, 250, 4000):
        metric = KNNEntropy(max_samples=500)
        for batch in z.split(size):
            metric.update(batch)
            assert sum(map(len, metric.keys)) <= max(1000, 4000 if size == 4000 else 0)
        codes, keys = metric._smallest_keys()
        assert len(codes) == len(keys) == 500
        assert len(torch.unique(codes, dim=0)) == 500
        quarters = torch.histc(codes[:, 0], 4, 0, 4000)
        assert (quarters - 125).abs().max() < 4 * (500 * 0.25 * 0.75) ** 0.5
        torch.testing.assert_close(metric.compute(), knn_entropy(codes))


def test_the_same_after_reset_and_copy():
    z = draw(600, 3)
    metric = KNNEntropy(max_samples=100)
    values = []
    for again in (metric, metric, copy.deepcopy(metric)):
        again.reset()
        for batch in z.split(150):
            again.update(batch)
        values.append(again.compute())
    assert values[0] == values[1] == values[2]


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="max_samples must be above k=5, got 5"):
        KNNEntropy(k=5, max_samples=5)
    metric = KNNEntropy(k=2)
    metric.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="k=2 neighbours need more than 2 codes, got 2"):
        metric.compute()
