"""Metrics in loops and collections of others: called, merged and drawn, they say what update and compute say."""

import pytest
import torch
from matplotlib.figure import Figure
from torchmetrics import MetricCollection

from lightning_plugins.core.full_precision import FullPrecisionMean
from lightning_plugins.eae.kept_codes import KNNEntropy
from lightning_plugins.metrics import (
    BirthdayParadox,
    FrechetDistance,
    GenerationScores,
    KernelDistance,
    PrecisionRecallDensityCoverage,
)

OF_FEATURES = {
    "frechet": lambda: FrechetDistance(None, 2),
    "kernel": lambda: KernelDistance(None, num_subsets=3, subset_size=40),
    "neighbours": lambda: PrecisionRecallDensityCoverage(None, k=2),
    "birthday": lambda: BirthdayParadox(None, collision_probability=5e-3),
}
PREDICTIONS = ["the cat sat on a mat", "猫坐在垫子上", "hello there you all", ""]
REFERENCES = ["the cat sat on the mat", "猫坐在垫子上", "hello you there all", "x"]
BATCH_SIZE = ("batch_size", "batch_size_lower", "batch_size_upper", "batch_support_size")


def rows(num, seed, columns=2):
    return torch.rand(num, columns, generator=torch.Generator().manual_seed(seed))


REAL, FAKE = rows(300, 0), rows(200, 1)


def updated(metric, real=REAL, fake=FAKE):
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric


def assert_same(found, expected, rtol=0.0):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("name", OF_FEATURES)
def test_merged_as_if_the_updates_had_followed(name):
    """Also after a value was asked for, into a metric that has seen nothing, and with one that has seen nothing."""
    make = OF_FEATURES[name]
    expected = updated(make()).compute()
    first, second = updated(make(), REAL[:120], FAKE[:90]), updated(make(), REAL[120:], FAKE[90:])
    assert_differ(first.compute(), expected)
    first.merge_state(second)
    rtol = 1e-5 if name == "frechet" else 0.0  # sums in another order
    assert_same(first.compute(), expected, rtol)
    empty = make()
    empty.merge_state(first)
    empty.merge_state(make())
    assert_same(empty.compute(), expected, rtol)
    by_name = make()
    by_name.merge_state(first.metric_state)
    assert_same(by_name.compute(), expected, rtol)


def assert_differ(found, expected):
    values = [(found, expected)] if isinstance(found, torch.Tensor) else [(found[k], expected[k]) for k in found]
    assert any(a != b for a, b in values)


def test_what_the_order_of_samples_changes():
    """Of BirthdayParadox the batch sizes alone: batches are samples in a row."""
    first, second = updated(OF_FEATURES["birthday"]()), OF_FEATURES["birthday"]()
    order = torch.randperm(len(FAKE), generator=torch.Generator().manual_seed(7))
    updated(second, REAL.flip(0), FAKE[order])
    found, expected = first.compute(), second.compute()
    for key, value in expected.items():
        if key not in BATCH_SIZE:
            assert_same(found[key], value, 1e-6)
    assert found["batch_size"] != expected["batch_size"]


def test_references_are_merged_once(tmp_path):
    expected = updated(OF_FEATURES["frechet"]()).compute()
    updated(OF_FEATURES["frechet"]()).save_reference(tmp_path / "reference")
    updated(OF_FEATURES["frechet"](), REAL[:100]).save_reference(tmp_path / "another")
    parts = [OF_FEATURES["frechet"]() for _ in range(3)]
    for part, fake in zip(parts, FAKE.split((50, 50, 100)), strict=True):
        part.update(fake, real=False)
    for part in parts[1:]:
        part.load_reference(tmp_path / "reference")
        parts[0].merge_state(part)
    assert_same(parts[0].compute(), expected, 1e-5)
    other = OF_FEATURES["frechet"]()
    other.load_reference(tmp_path / "another")
    with pytest.raises(ValueError, match="have loaded different references: load the same one into both"):
        parts[0].merge_state(other)


@pytest.mark.parametrize("name", OF_FEATURES)
def test_other_features_are_not_merged(name):
    wide = FrechetDistance(None, 3) if name == "frechet" else OF_FEATURES[name]()
    updated(wide, rows(50, 2, 3), rows(50, 3, 3))
    metric = updated(OF_FEATURES[name]())
    with pytest.raises(ValueError, match="merge_state: "):
        metric.merge_state(wide)
    assert_same(metric.compute(), updated(OF_FEATURES[name]()).compute())
    digits = FrechetDistance() if name == "frechet" else type(wide)()
    with pytest.raises(ValueError, match="merge metrics with the same feature"):
        metric.merge_state(digits)


def test_in_a_collection():
    """Updated together they are what each alone is; a call, which has no value, is refused."""
    collection = MetricCollection({name: make() for name, make in OF_FEATURES.items()})
    alone = {name: make() for name, make in OF_FEATURES.items()}
    for part in range(2):
        half = slice(150 * part, 150 * (part + 1)), slice(100 * part, 100 * (part + 1))
        updated(collection, REAL[half[0]], FAKE[half[1]])
        for metric in alone.values():
            updated(metric, REAL[half[0]], FAKE[half[1]])
    found = collection.compute()
    for name, metric in alone.items():
        value = metric.compute()
        for key, expected in value.items() if isinstance(value, dict) else [("", value)]:
            assert_same(found[f"{name}_{key}" if f"{name}_{key}" in found else key or name], expected)
    for make in OF_FEATURES.values():
        for call in (MetricCollection([make()]), make(), make().forward):
            with pytest.raises(TypeError, match=r"has no value of one batch: call update\(images, real\)"):
                call(REAL, real=True)


def test_scores_of_a_batch_and_of_all():
    scores, whole = GenerationScores(), GenerationScores()
    for part in (slice(0, 2), slice(2, 4)):
        alone = GenerationScores()
        alone.update(PREDICTIONS[part], REFERENCES[part])
        assert_same(scores(PREDICTIONS[part], REFERENCES[part]), alone.compute())
    whole.update(PREDICTIONS, REFERENCES)
    assert_same(scores.compute(), whole.compute(), 1e-6)
    nested = MetricCollection([GenerationScores()])
    assert_same(nested(PREDICTIONS, REFERENCES), whole.compute())
    for call in (scores, scores.forward, scores.update, MetricCollection([GenerationScores()]).update, nested):
        with pytest.raises(ValueError, match="must be a list of texts"):
            call("ab", "ab")
        with pytest.raises(ValueError, match="Each prediction needs one reference: got 4 and 2"):
            call(PREDICTIONS, REFERENCES[:2])
    assert_same(scores.compute(), whole.compute(), 1e-6)  # what was refused has changed nothing


def test_scores_are_merged():
    first, second, whole = GenerationScores(), GenerationScores(), GenerationScores()
    first.update(PREDICTIONS[:2], REFERENCES[:2])
    second.update(PREDICTIONS[2:], REFERENCES[2:])
    whole.update(PREDICTIONS, REFERENCES)
    first.compute()
    for name in first:
        first[name].merge_state(second[name])
    assert_same(first.compute(), whole.compute(), 1e-6)


def test_a_mean_is_merged():
    first, second = FullPrecisionMean(), FullPrecisionMean()
    first.update(torch.tensor([1.0, 2.0]))
    assert first.compute() == 1.5
    second.update(torch.tensor(5.0), 2.0)
    first.merge_state(second)
    assert first.compute() == 13 / 4


def test_an_entropy_of_a_batch_and_of_all():
    codes = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    entropy, first, whole = KNNEntropy(), KNNEntropy(), KNNEntropy()
    first.update(codes[:100])
    assert_same(MetricCollection([entropy])(codes[:100])["KNNEntropy"], first.compute())
    entropy(codes[100:])
    whole.update(codes)
    assert_same(entropy.compute(), whole.compute())
    with pytest.raises(RuntimeError, match="merge_state"):  # which codes are kept could not be said
        first.merge_state(whole)


@pytest.mark.parametrize("name", [*OF_FEATURES, "mean", "entropy", "scores"])
def test_drawn(name):
    metric = {"mean": FullPrecisionMean, "entropy": KNNEntropy, "scores": GenerationScores, **OF_FEATURES}[name]()
    if name == "scores":
        metric.update(PREDICTIONS, REFERENCES)
        figures = [figure for figure, _ in metric.plot()]
        assert len(figures) == 6
    else:
        updated(metric) if name in OF_FEATURES else metric.update(REAL)
        axes = Figure().add_subplot()
        figure, drawn = metric.plot([metric.compute()] * 2, ax=axes)
        assert drawn is axes and axes.lines
        figures = [figure, metric.plot(ax=Figure().add_subplot())[0]]
    assert all(isinstance(figure, Figure) or figure is None for figure in figures)
