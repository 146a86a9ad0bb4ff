"""Two and four processes with uneven rows, one without any: values and derivatives of one process with all rows."""

import pytest
import torch
from ranks import load_script, torchrun

pytestmark = pytest.mark.ddp

script = load_script("gather")


@pytest.fixture(scope="module")
def one():
    return script.results(1, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Written by four processes, and then by two of them."""
    folder = tmp_path_factory.mktemp("gather")
    with torchrun("gather", folder, cwd=folder, processes=4):
        pass
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, folder):
    """What each process of a group found."""
    return [
        torch.load(folder / f"world{request.param}-rank{rank}.pt", weights_only=True) for rank in range(request.param)
    ]


def test_rows_and_their_place(one, ranks):
    start = 0
    for rank, count in zip(ranks, script.COUNTS[len(ranks)], strict=True):
        assert torch.equal(rank["rows"], one["rows"])
        assert rank["own"].tolist() == [start, start + count]
        start += count


def test_batch_norm_is_of_all_rows(one, ranks):
    every, _, *statistics = one["batch norm"]
    for rank in ranks:
        found, own, *theirs = rank["batch norm"]
        torch.testing.assert_close([found, *theirs], [every, *statistics], rtol=1e-10, atol=1e-10)
        assert torch.equal(own, found[slice(*rank["own"])])


@pytest.mark.parametrize("name", ["gradient", "second"])
def test_derivatives_of_all_rows(one, ranks, name):
    for rank in ranks:
        torch.testing.assert_close(rank[name], one[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [*script.losses(0)])
def test_losses_of_codes_equal_one_process(one, ranks, name):
    """The value, and the mean gradient of the encoder's weights, which are up to 25."""
    assert max(gradient.abs().max() for gradient in one[name][1:]) > 0.01
    for rank in ranks:
        torch.testing.assert_close(rank[name], one[name], rtol=1e-10, atol=1e-10)


def test_normalising_before_the_gather_is_another_gradient(one, ranks):
    if "wrong order" in ranks[0]:
        right, wrong = (
            torch.cat([g.flatten() for g in found]) for found in (one["entropy"][1:], ranks[0]["wrong order"])
        )
        assert torch.cosine_similarity(right, wrong, dim=0) < 0.99


def test_draws_of_all_processes_are_shared(one, ranks):
    for name in ("mmd", "sigreg directions"):
        for rank in ranks:
            torch.testing.assert_close(rank[name], ranks[0][name], rtol=0, atol=0)


def test_metric_of_uneven_processes(one, ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["metric"], one["metric"])


@pytest.mark.filterwarnings("ignore:FrechetDistance of 25 generated images")  # fewer than features
def test_metrics_of_images(folder, tmp_path):
    """Two processes with different numbers of images, or one with none, find what one process with all does."""
    load_script("compare_images").run(tmp_path)
    expected = torch.load(tmp_path / "images-rank0.pt", weights_only=True)
    for rank in (0, 1):
        found = torch.load(folder / f"images-rank{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys() and len(found) == 8
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {found[name]}, {value}")
    assert expected["reference count"] == 75
