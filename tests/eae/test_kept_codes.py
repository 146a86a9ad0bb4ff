"""The subset of codes that metrics keep: fair, repeatable, bounded, and in full precision."""

import copy

import pytest
import scipy.stats
import torch

from lightning_plugins.eae.diagnostics import LatentDiagnostics, latent_diagnostics
from lightning_plugins.eae.entropy import knn_entropy
from lightning_plugins.eae.kept_codes import KeptCodes, KNNEntropy


def kept(metric, index, sizes):
    for part in index.split(sizes):
        metric.update(part[:, None])
    return metric.codes()[:, 0]


def test_of_many_codes_each_is_as_likely_to_stay():
    index = torch.arange(20_000.0)
    sizes = [10_000] + [100] * 99 + [1] * 100  # a code of a small update must not be likelier, nor an early one
    before = torch.get_rng_state()
    metric = KNNEntropy(max_codes=4000)
    chosen = kept(metric, index, sizes)
    assert torch.equal(before, torch.get_rng_state())
    assert len(chosen.unique()) == 4000
    assert scipy.stats.kstest(chosen.numpy() / 20_000, "uniform").pvalue > 0.01
    places = chosen[(chosen >= 10_000) & (chosen < 19_900)] % 100  # nor a place in its update
    assert scipy.stats.chisquare(torch.histc(places, 10, 0, 100)).pvalue > 0.01
    assert sum(map(len, metric.numbers)) <= 8000  # and memory is bounded
    assert sum(map(len, metric.kept)) <= 2 * 8000  # a code and its class
    torch.testing.assert_close(metric.compute(), knn_entropy(chosen[:, None]))
    metric.reset()
    assert torch.equal(chosen, kept(metric, index, sizes))
    assert torch.equal(chosen, kept(copy.deepcopy(LatentDiagnostics(1, max_codes=4000)), index, sizes))


def test_processes_have_numbers_of_their_own(monkeypatch):
    """Two processes, one with fewer updates; what they hold is put together as torchmetrics does."""
    index = torch.arange(10_000.0)
    metrics = [KNNEntropy(max_codes=2000) for _ in range(2)]
    for rank, part in enumerate([index[:3000], index[3000:]]):
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            for update in part.split(500):
                metrics[rank].update(update[:, None])
    first, second = metrics
    assert not torch.equal(first.numbers[0][:9], second.numbers[0][:9])
    first.kept, first.numbers = first.kept + second.kept, first.numbers + second.numbers
    chosen = first.codes()[:, 0]
    assert len(chosen.unique()) == 2000
    assert scipy.stats.kstest(chosen.numpy() / 10_000, "uniform").pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_code_keeps_its_class(dtype):
    """However many are left out; codes without classes are of class 0."""
    metric, largest = KeptCodes(max_codes=1000, latent_dim=3).to(dtype), 2**24 - 1  # float32 holds every whole number
    for part in torch.arange(5000).split([1700, 300, 3000]):
        metric.update(part[:, None].expand(-1, 3).float(), largest - part)
    codes, labels = metric.labelled_codes()
    assert codes.shape == (1000, 3) and labels.dtype == torch.int64
    assert torch.equal(codes, (largest - labels)[:, None].expand(-1, 3).float())
    assert torch.equal(codes, metric.codes()) and torch.equal(codes, metric.compute())
    metric.reset()
    metric.update(torch.rand(5, 3))
    assert metric.labelled_codes()[1].tolist() == [0] * 5


@pytest.mark.parametrize("labels", [torch.zeros(4, dtype=torch.int64), torch.zeros(5), torch.zeros(5, 1).long()])
def test_wrong_classes_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels must be \(5,\) integers, a class for each code, got"):
        KeptCodes().update(torch.rand(5, 3), labels)


def test_another_process_adds_its_codes():
    """One that has the same as this one: twice the codes, twice the count, one dimension."""
    metric = KeptCodes()
    metric.update(torch.arange(12.0).view(4, 3))
    metric.sync(dist_sync_fn=lambda x, group: [x, x], distributed_available=lambda: True)
    assert (int(metric.num_seen), int(metric.dim)) == (8, 3)
    codes = metric.codes_here()
    assert torch.equal(codes[codes[:, 0].argsort()], torch.arange(12.0).view(4, 3).repeat_interleave(2, 0))


def test_no_codes():
    assert LatentDiagnostics(3).codes().shape == (0, 3)
    assert [part.shape for part in KeptCodes(latent_dim=2).labelled_codes()] == [(0, 2), (0,)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_module_around_rounds_no_code(dtype):
    """As precision="bf16-true" does, and its opposite."""
    z = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    owner = torch.nn.ModuleList([LatentDiagnostics(2)]).to(dtype)
    for part in z.to(torch.promote_types(dtype, torch.float32)).split(100):
        owner[0].update(part)
    assert owner[0].codes().dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(owner[0].compute(), latent_diagnostics(z), check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("metric", "arguments", "words"),
    [
        (KeptCodes, {"latent_dim": -1}, "latent_dim=-1 must be 0 or more"),
        (KeptCodes, {"max_codes": 0}, "max_codes=0 must be 1 or more"),
        (KNNEntropy, {"k": 0}, "k=0 must be 1 or more"),
    ],
)
def test_wrong_arguments_are_refused(metric, arguments, words):
    assert KeptCodes().max_codes == 4096  # as the docstring of EAE says
    with pytest.raises(ValueError, match=words):
        metric(**arguments)


def test_with_keys_the_same_codes_stay_however_they_are_shared():
    codes, keys = torch.arange(60.0)[:, None], torch.arange(60)
    whole, parts = KeptCodes(max_codes=10), [KeptCodes(max_codes=10) for _ in range(3)]
    whole.update(codes, keys=keys)
    for rank, part in enumerate(parts):
        for rows in keys[rank::3].split(3):
            part.update(codes[rows], keys=keys[rows])
    kept, numbers = (torch.cat(column) for column in zip(*(part._smallest() for part in parts), strict=True))
    joined = kept[numbers.argsort()[:10], :1]
    assert torch.equal(joined, whole.codes()) and len(joined) == 10
    assert not torch.equal(joined.flatten().sort().values, torch.arange(10.0))
