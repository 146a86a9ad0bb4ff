"""Pictures: the right pixels in the right place."""

import torch

from lightning_plugins.capsnet import CapsNet, RoutingTrace, plots


def test_overlay_colours():
    parts = torch.zeros(1, 2, 1, 2, 2)
    parts[0, 0, 0, 0] = 1  # first digit: the upper row
    parts[0, 1, 0, :, 0] = 1  # second digit: the left column
    red, green, blue = plots.overlay(parts)[0]
    assert red.tolist() == [[1, 1], [0, 0]] and green.tolist() == [[1, 0], [1, 0]] and blue.sum() == 0


def test_figure_four_has_the_papers_values():
    expected = torch.tensor([-0.25, -0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25])
    torch.testing.assert_close(plots.perturbation_values(), expected)


def names(figure):
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_wrong_readings_are_red():
    images = torch.rand(3, 1, 8, 8)
    figure = plots.plot_reconstructions(images, images, torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3]))
    assert names(figure) == ["1 read 1", "2 read 5", "3 read 3"]
    assert [label.get_color() for label in figure.axes[0].get_xticklabels()] == ["black", "red", "black"]


def test_coupling_maps_are_of_their_class():
    """One type on a 2 x 3 grid: the map of class j holds column j of the couplings, in the order of the grid."""
    couplings = torch.rand(1, 1, 6, 4)
    trace = RoutingTrace(couplings, torch.rand(1, 1, 4, 8), torch.zeros(1, 1), torch.zeros(1, 1))
    figure = plots.plot_couplings(torch.rand(1, 1, 4, 6), trace, (1, 2, 3), torch.tensor([2]))
    canvas = figure.axes[1].images[0].get_array()
    for j in range(4):
        assert canvas[:4:2, 7 * j : 7 * j + 6 : 2].ravel().tolist() == couplings[0, 0, :, j].tolist()


def test_two_digit_parts_meet_their_capsule():
    torch.manual_seed(0)
    model = CapsNet(num_labels=2, channels=8, num_types=2, decoder_hidden=(16,)).eval()
    batch = {"image": torch.rand(3, 1, 28, 28), "parts": torch.rand(3, 2, 1, 28, 28)}
    read = model.predict_labels(model(batch["image"])).flip(1)  # labels in descending order, all read rightly
    with torch.no_grad():
        figures = plots.capsnet_figures(model, batch | {"label": read})
    assert names(figures["reconstructions"]) == [f"{a}+{b} read {a}+{b}" for a, b in read.tolist()]


def test_figures_that_a_network_cannot_have_are_left_out():
    torch.manual_seed(0)
    batch = {"image": torch.rand(3, 1, 28, 28), "label": torch.tensor([1, 2, 3])}
    with torch.no_grad():
        assert set(plots.capsnet_figures(CapsNet("su2018"), batch)) == {"routing", "couplings"}
        names = set(plots.capsnet_figures(CapsNet("efficient"), batch))
    assert names == {"reconstructions", "pose_dimensions", "routing", "couplings"}
