"""Pictures of an autoencoder: the right pixels and curves in the right place, and nothing cut off."""

import pytest
import scipy.stats
import torch

from lightning_plugins.core.logging import figure_to_image
from lightning_plugins.eae import plots

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 64, 64)]


def images(n, shape, seed=0):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed))


def inside(figure):
    """The figure as drawn, after a look at its titles and names of rows: none is cut off."""
    picture = figure_to_image(figure)
    height, width = picture.shape[1:]
    texts = [axes.title for axes in figure.axes] + ([figure._suptitle] if figure._suptitle else [])
    texts += [label for axes in figure.axes if axes.images for label in axes.get_yticklabels()[:2]]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert all(b.x0 >= -1 and b.x1 <= width + 1 and b.y0 >= -1 and b.y1 <= height + 1 for b in boxes)
    return picture


@pytest.mark.parametrize(("n", "shape"), [(1, SHAPES[0]), (10, SHAPES[1]), (21, SHAPES[2]), (70, SHAPES[0])])
def test_a_reconstruction_lies_under_its_image(n, shape):
    C, H, W = shape
    given, decoded = images(n, shape), images(n, shape, seed=1)
    figure = plots.plot_reconstructions(given, decoded)
    canvas = torch.tensor(figure.axes[0].images[0].get_array().data)
    canvas = canvas.reshape(*canvas.shape[:2], C)
    n = min(n, 64)
    columns = (canvas.shape[1] + 1) // (W + 1)
    assert columns <= 16
    for i in range(n):
        y, x = i // columns * 2 * (H + 1), i % columns * (W + 1)
        assert torch.equal(canvas[y : y + H, x : x + W].permute(2, 0, 1), given[i])
        assert torch.equal(canvas[y + H + 1 : y + 2 * H + 1, x : x + W].permute(2, 0, 1), decoded[i])
    assert canvas.shape[0] == -(-n // columns) * 2 * (H + 1) - 1
    error = (given - decoded)[:64].square().sum((1, 2, 3)).mean()
    assert figure.axes[0].get_title().endswith(f" {error:.3g}")
    inside(figure)


@pytest.mark.parametrize("shape", SHAPES)
def test_samples_of_each_prior(shape):
    samples = {name: images(64, shape, seed) for seed, name in enumerate(["normal", "gaussian", "mixture"])}
    figure = plots.plot_samples(samples)
    assert [axes.get_title() for axes in figure.axes] == ["prior: normal", "prior: gaussian", "prior: mixture"]
    H, W = shape[1:]
    for axes, expected in zip(figure.axes, samples.values(), strict=True):
        canvas = axes.images[0].get_array()
        assert canvas.shape[:2] == (8 * H + 7, 8 * W + 7)
        last = torch.tensor(canvas[-H:, -W:].data).reshape(H, W, -1)
        assert torch.equal(last.permute(2, 0, 1), expected[-1])
    assert inside(figure).shape[2] < 2500


def test_samples_of_one_prior_may_be_few():
    figure = plots.plot_samples({"normal": images(5, (1, 8, 8))})
    assert figure.axes[0].images[0].get_array().shape == (17, 26)
    inside(figure)


@pytest.mark.parametrize("shape", SHAPES)
def test_interpolations_go_from_left_to_right(shape):
    rows = images(15, shape).view(3, 5, *shape)
    figure = plots.plot_interpolations(rows, "slerp")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert axes.get_title().endswith("slerp")
    H, W = shape[1:]
    canvas = torch.tensor(axes.images[0].get_array().data).reshape(3 * H + 2, 5 * W + 4, -1)
    assert torch.equal(canvas[:H, -W:].permute(2, 0, 1), rows[0, -1])
    inside(figure)


def test_distance_from_the_normal_is_that_of_scipy():
    z = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.tensor([1, 2, 0.1])
    z[:, 2] += 1
    expected = [scipy.stats.kstest(column.numpy(), "norm").statistic for column in z.T]
    assert plots.normal_distance(z).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("N", "d"), [(50, 1), (2, 2), (300, 5)])
def test_latents_show_dimensions_radius_and_correlation(N, d):
    z = torch.randn(N, d, generator=torch.Generator().manual_seed(0))
    figure = plots.plot_latents(z)
    titles = [axes.get_title() for axes in figure.axes]
    assert sum(title.startswith("dim ") for title in titles) == min(d, 8)
    radius = z.norm(dim=1)
    assert any(title.startswith(f"radius {radius.mean():.2f} ± {radius.std():.2f}") for title in titles)
    assert any(title.startswith("correlation") for title in titles) == (d > 1)
    inside(figure)


def test_latents_show_the_dimensions_that_are_off():
    z = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    z[:, 3], z[:, 17], z[:, 38] = 0.01 * z[:, 3], 50 * z[:, 17], 2.0
    figure = plots.plot_latents(z)
    titles = [axes.get_title().split()[:2] for axes in figure.axes]
    shown = [int(words[1]) for words in titles if words[:1] == ["dim"]]
    assert {3, 17, 38} < set(shown) and shown == sorted(shown)
    for axes in figure.axes[:8]:  # nothing is lost beyond the edges: the bars hold everything
        assert sum(bar.get_height() * bar.get_width() for bar in axes.patches) == pytest.approx(1)
    (heat_map,) = (axes.images[0].get_array() for axes in figure.axes if axes.get_title().startswith("correlation"))
    assert heat_map[0, 1] == pytest.approx(float(scipy.stats.pearsonr(z[:, 0], z[:, 1]).statistic), abs=1e-5)
    assert heat_map.mask[38].all() and heat_map.mask.sum() == 39 + 40 + 39  # row and column of the constant, diagonal
    assert "8 of 40" in figure._suptitle.get_text()
    inside(figure)


def test_latents_of_a_diverged_or_degenerate_model_are_drawn():
    z = torch.nn.functional.normalize(torch.randn(100, 4, generator=torch.Generator().manual_seed(0)))
    z[3:5] = torch.nan
    title = plots.plot_latents(z)._suptitle.get_text()
    assert title == "98 codes against N(0, I) (2 more are not finite)"
    inside(plots.plot_latents(torch.zeros(10, 3)))


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(
        ValueError, match=r"must both be \(n, C, H, W\) with n > 0, got \(2, 1, 8, 8\) and \(3, 1, 8, 8\)"
    ):
        plots.plot_reconstructions(images(2, (1, 8, 8)), images(3, (1, 8, 8)))
    with pytest.raises(ValueError, match="at least one prior"):
        plots.plot_samples({})
    with pytest.raises(ValueError, match=r"n > 0, got \(0, 1, 8, 8\)"):
        plots.plot_samples({"normal": torch.zeros(0, 1, 8, 8)})
    with pytest.raises(ValueError, match=r"rows must be \(R, S, C, H, W\) .* got \(3, 1, 8, 8\)"):
        plots.plot_interpolations(images(3, (1, 8, 8)), "linear")
    with pytest.raises(ValueError, match=r"z must be \(N, d\) with two finite codes or more, got \(1, 4\)"):
        plots.plot_latents(torch.zeros(1, 4))


def test_all_pictures_of_a_model(small):
    """The same at each call, whatever was drawn between; a training model goes on training."""
    model, shown = small(prior="gaussian", num_components=2), images(4, SHAPES[0])
    model.prior.remember(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    first, _, second = (plots.eae_figures(model, shown, None, torch.randn(30, 4)) for _ in range(3))
    assert [*first] == ["reconstructions", "samples", "interpolations", "latents"] and model.training
    assert [axes.get_title() for axes in first["samples"].axes] == ["prior: normal", "prior: gaussian"]
    pairs = zip(first["samples"].axes, second["samples"].axes, strict=True)
    assert all((a.images[0].get_array() == b.images[0].get_array()).all() for a, b in pairs)


def test_pictures_of_one_image_and_one_code_are_two(small):
    model = small(conditional=True).eval()
    figures = plots.eae_figures(model, images(1, SHAPES[0]), torch.tensor([2]), torch.zeros(1, 4))
    assert [*figures] == ["reconstructions", "samples"]
    assert [axes.get_title() for axes in figures["samples"].axes] == ["prior: normal"]
