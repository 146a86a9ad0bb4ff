"""The birthday paradox against scipy, brute force, and distributions whose support is known."""

import math

import pytest
import scipy.spatial.distance
import scipy.stats
import torch

from lightning_plugins.metrics.birthday import BirthdayParadox, half_batch_size, poisson_interval, support_size
from lightning_plugins.metrics.near_duplicates import closest_pairs, near_duplicates


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(num_items, num_samples, seed=0):
    """Equally likely items as points on a line, one apart."""
    return torch.randint(num_items, (num_samples, 1), generator=generator(seed)).float()


def heavy_head(num_samples, seed=0, head=100):
    """Half of the mass on a few items, half on a million."""
    g = generator(seed)
    in_head = torch.rand(num_samples, generator=g) < 0.5
    rare = head + torch.randint(10**6, (num_samples,), generator=g)
    return torch.where(in_head, torch.randint(head, (num_samples,), generator=g), rare).double()[:, None]


def evaluate(samples, real=None, **options):
    birthday = BirthdayParadox(feature=None, **options)
    if real is not None:
        birthday.update(real, real=True)
    for part in samples.split(700):
        birthday.update(part, real=False)
    return {name: value.item() for name, value in birthday.compute().items()}


def test_interval_is_scipys():
    for count in (0, 1, 2.5, 10, 161, 62_487):
        for level in (0.68, 0.95):
            tail = (1 - level) / 2
            lower = scipy.stats.gamma.ppf(tail, count) if count else 0
            expected = lower, scipy.stats.gamma.ppf(1 - tail, count + 1)
            assert poisson_interval(count, level) == pytest.approx(expected, rel=1e-9)


def test_support_of_a_batch_size_is_that_of_the_birthday_problem():
    """The smallest batch with a collision half of the time, from the exact product."""
    for n, batch_size in ((1_000, 38), (10_000, 119), (160_000, 472)):
        unequal, s = 1.0, 0
        while unequal > 0.5:
            unequal, s = unequal * (1 - s / n), s + 1
        assert s == batch_size
        assert support_size(s) == pytest.approx(n, rel=0.05)


def test_median_interval_is_the_binomials():
    runs = torch.arange(1, 41)
    middle, lower, upper = half_batch_size(runs[torch.randperm(40, generator=generator())], unfinished=0)
    rank = int(scipy.stats.binom.ppf(0.025, 40, 0.5))  # as a sign test has it
    assert (middle, lower, upper) == (20, rank, 41 - rank)
    assert half_batch_size(torch.tensor([7, 9, 8]), 0) == (8, 2, math.inf)  # too few for an interval
    assert half_batch_size(torch.tensor([3]), 50) == (3, 2, math.inf)
    assert half_batch_size(torch.tensor([], dtype=torch.int64), 60) == (60, 2, math.inf)


@pytest.mark.parametrize("chunk_size", [7, 64, 1000])
def test_pairs_are_those_of_brute_force(chunk_size):
    x = torch.randn(150, 5, generator=generator(), dtype=torch.float64) + 100
    x[40] = x[3]
    x[90] = x[3]
    every = torch.from_numpy(scipy.spatial.distance.pdist(x))
    rows, columns = torch.triu_indices(150, 150, 1)
    order = every.argsort(stable=True)[:30]
    distances, pairs = closest_pairs(x, 30, chunk_size)
    torch.testing.assert_close(distances, every[order])
    assert {tuple(pair) for pair in pairs.tolist()} == {(int(rows[i]), int(columns[i])) for i in order}
    assert {(3, 40), (3, 90), (40, 90)} == {tuple(pair) for pair in pairs[:3].tolist()}
    threshold = float(every.sort().values[400:402].mean())
    found = near_duplicates(x, threshold, chunk_size)
    near = torch.from_numpy(scipy.spatial.distance.squareform(every.numpy())) <= threshold
    assert found.count == 401
    assert found.previous.tolist() == [max(near[j, :j].nonzero().flatten().tolist(), default=-1) for j in range(150)]
    assert near_duplicates(x, 0.0, chunk_size).count == 3
    assert len(closest_pairs(x[:4], 30, chunk_size)[0]) == 6


def test_dispersion_is_the_variance_of_the_count():
    """Over many draws, where items are equally likely and where they are not."""
    for sample in (lambda seed: draw(200, 300, seed), lambda seed: heavy_head(300, seed, head=20)):
        found = [near_duplicates(sample(seed), 0.5) for seed in range(400)]
        counts = torch.tensor([f.count for f in found]).double()
        measured = float(counts.var() / counts.mean())
        named = float(torch.tensor([f.dispersion for f in found]).mean())
        assert 0.85 * measured < named < max(1.2, 1.15 * measured)
    assert measured > 2


def test_known_supports():
    for n, num_samples in ((1_000, 4_000), (10_000, 6_000)):
        values = evaluate(draw(n, num_samples), threshold=0.5)
        assert values["pairs"] == pytest.approx(math.comb(num_samples, 2) / n, rel=0.2)
        assert values["support_size_lower"] < n < values["support_size_upper"]
        assert values["support_size"] == pytest.approx(n, rel=0.15)
        assert values["batch_size_lower"] <= 1.1774 * math.sqrt(n) <= values["batch_size_upper"]
        assert values["batch_support_size"] == pytest.approx(support_size(values["batch_size"]))
    head = evaluate(heavy_head(4_000), threshold=0.5)
    assert head["support_size"] == pytest.approx(400, rel=0.1)  # 1 / sum p^2, of 1,000,100 items
    assert head["support_size_lower"] < 400 < head["support_size_upper"]


def test_intervals_hold_the_truth_as_often_as_they_say():
    for truth, sample in ((2_000, lambda seed: draw(2_000, 300, seed)), (400, lambda seed: heavy_head(300, seed))):
        hits = {"support_size": 0, "batch_size": 0}
        median = {2_000: 53, 400: 24}[truth]
        for seed in range(150):
            values = evaluate(sample(seed), threshold=0.5)
            hits["support_size"] += values["support_size_lower"] <= truth <= values["support_size_upper"]
            hits["batch_size"] += values["batch_size_lower"] <= median <= values["batch_size_upper"]
        assert min(hits.values()) >= 135, hits  # 142.5 expected of 95 %


def test_collapse_and_real_images_are_told_apart_by_the_automatic_threshold():
    real, fresh = torch.randn(2, 2_000, 4, generator=generator()).unbind()
    values = evaluate(fresh, real, collision_probability=1e-3)
    assert values["support_size_lower"] < 1_000 < values["support_size_upper"]
    assert values["support_size"] == pytest.approx(1_000, rel=0.2)
    collapsed = fresh[torch.randint(200, (2_000,), generator=generator(1))]
    collapsed = collapsed + 1e-3 * torch.randn(collapsed.shape, generator=generator(2))
    values = evaluate(collapsed, real)
    assert values["support_size"] == pytest.approx(200, rel=0.1)
    assert values["batch_size"] == pytest.approx(1.1774 * math.sqrt(200), abs=3)
    distances = torch.from_numpy(scipy.spatial.distance.pdist(real)).sort().values
    assert values["threshold"] == pytest.approx(float(distances[199]), rel=1e-5)  # 1e-4 of 1,999,000 pairs


def grouped(num_items, pairs, triples):
    """Items ten apart, of which some have one or two others within 0.2 (of triples all three, of pairs both)."""
    offsets = [(0.0, 0.1)] * pairs + [(0.0, 0.1, 0.2)] * triples
    groups = offsets + [(0.0,)] * (num_items - sum(map(len, offsets)))
    return torch.tensor([[10.0 * place + offset] for place, group in enumerate(groups) for offset in group])


def test_the_interval_counts_what_is_uncertain_of_generated_and_of_real_images():
    """By hand: 1/m of both from Hoeffding's variance, and the ends from scipy's chi-squared with 2 m degrees."""
    real, fake = grouped(60, pairs=5, triples=4), grouped(30, pairs=2, triples=3)
    real_pairs, fake_pairs = 5 + 4 * 3, 2 + 3 * 3
    shares = []
    for n, c, triples in ((60, real_pairs, 4), (30, fake_pairs, 3)):
        p = c / math.comb(n, 2)
        shared = triples * 3 * 2 * 1 - n * (n - 1) * (n - 2) * p**2  # three items of a triple, each with two near it
        assert shared > 0
        shares.append(max(1.0, 1 + shared / c) / c)
    m = 1 / sum(shares)
    lower, upper = scipy.stats.chi2.ppf(0.025, 2 * m) / 2, scipy.stats.chi2.ppf(0.975, 2 * (m + 1)) / 2
    size = math.comb(30, 2) / fake_pairs
    values = evaluate(fake, real, collision_probability=real_pairs / math.comb(60, 2))
    assert values["threshold"] == pytest.approx(0.2, rel=1e-4)
    assert (values["pairs"], values["support_size"]) == (fake_pairs, pytest.approx(size))
    assert values["support_size_lower"] == pytest.approx(size * m / upper, rel=1e-5)
    assert values["support_size_upper"] == pytest.approx(size * m / lower, rel=1e-5)


def test_pairs_that_share_no_item_vary_as_a_poisson_count_at_least():
    assert near_duplicates(grouped(10, pairs=2, triples=0), 0.15).dispersion == 1


@pytest.mark.parametrize("max_real", [10_000, 150])
def test_the_threshold_follows_real_images_that_come_later(max_real):
    """Closer ones, more of them: after a first answer as if all had come at once."""
    real, fake = torch.randn(2, 400, 2, generator=generator()).unbind()
    options = {"collision_probability": 2e-3, "max_real": max_real}
    birthday = BirthdayParadox(feature=None, **options)
    birthday.update(fake, real=False)
    for rows, seen in ((real[:200], 200), (real[200:] / 3, 400)):
        birthday.update(rows, real=True)
        together = evaluate(fake, torch.cat([real[:200], real[200:] / 3])[:seen], **options)
        assert {name: value.item() for name, value in birthday.compute().items()} == together


def test_no_pair_gives_a_bound_and_says_so():
    samples = torch.arange(500.0)[:, None]
    with pytest.warns(UserWarning, match="no two of 500 samples are near each other"):
        values = evaluate(samples, threshold=0.5)
    assert values["support_size"] == values["support_size_lower"] == pytest.approx(math.comb(500, 2) / 3.689, rel=1e-3)
    assert values["support_size_upper"] == values["batch_size_upper"] == math.inf
    assert (values["pairs"], values["batch_size"]) == (0, 500)
    same = evaluate(torch.ones(50, 3), threshold=0.0)
    assert (same["support_size"], same["batch_size"]) == (1, 2)


def test_images_come_through_the_extractor_and_the_closest_pairs_are_found():
    images = torch.rand(80, 1, 8, 8, generator=generator())
    images[70], images[71], images[33], images[5] = images[2], images[2], images[9], images[6].roll(1, -1)
    birthday = BirthdayParadox("digits", collision_probability=1e-2)
    birthday.update(torch.rand(200, 1, 8, 8, generator=generator(1)), real=True)
    birthday.update(images, real=False)
    distances, pairs = birthday.closest_pairs(5)
    equal = {tuple(pair) for pair in pairs[:2].tolist()}
    assert (9, 33) in equal and len(equal & {(2, 70), (2, 71), (70, 71)}) == 1  # one pair of three equal images
    assert distances[:2].max() < 1e-4 < distances[2]
    assert len(pairs.unique()) == 10
    first = birthday.compute()
    birthday.reset()
    birthday.update(images, real=False)  # the real ones are kept
    assert birthday.compute() == first


def test_refusals_and_warnings_name_the_cure():
    with pytest.raises(ValueError, match=r"collision_probability=1.5 must lie in \(0, 1\)"):
        BirthdayParadox(collision_probability=1.5)
    with pytest.raises(ValueError, match="threshold=-1 must be 0 or more: it is a distance"):
        BirthdayParadox(threshold=-1)
    with pytest.raises(ValueError, match=r"of 50 real images \(max_real=10000\): give at least 101"):
        evaluate(draw(9, 9), torch.randn(50, 1))
    with pytest.raises(ValueError, match="compares pairs of samples, got 1"):
        evaluate(draw(9, 1), threshold=1.0)
    with pytest.warns(UserWarning, match=r"threshold rests on 2 pair\(s\) of 179 real images"):
        evaluate(draw(9, 9), torch.randn(179, 1, generator=generator()))
    with pytest.warns(UserWarning, match=r"rests on 1 pair\(s\) of 101"):
        evaluate(draw(9, 9), torch.randn(101, 1, generator=generator()))
