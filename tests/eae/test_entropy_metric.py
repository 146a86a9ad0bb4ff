import pickle

import pytest
import torch

from lightning_plugins.eae.entropy import entropy_gap, knn_entropy
from lightning_plugins.eae.kept_codes import KNNEntropy


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


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="max_codes=5 must be 6 or more: k=5"):
        KNNEntropy(k=5, max_codes=5)
    metric = KNNEntropy(k=2)
    metric.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="k=2 neighbours need more than 2 codes, got 2"):
        metric.compute()
