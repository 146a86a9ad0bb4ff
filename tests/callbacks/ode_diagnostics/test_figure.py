"""The page of ODE diagnostics: the right values from any log, and a page that can be printed."""

import sys
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.colors import to_rgb

from lightning_plugins.callbacks.ode_diagnostics.figure import ode_figure, plot_ode_diagnostics
from lightning_plugins.callbacks.ode_diagnostics.read_log import read_columns

NAN = float("nan")
# What a run logs in this order, step by step: values that single precision holds exactly. Step 8 is logged twice, as
# by a resumed run; epoch rows stand in between; one value is not a number.
LOGGED = [
    ({"train/loss": 4.0, "epoch": 0}, 3),
    ({"ode/time": 0.5, "ode/loss": 4.0, "ode/edge_ratio_step": 0.25, "epoch": 0}, 4),
    ({"val/loss": 3.5, "val/accuracy": 0.5, "epoch": 0}, 6),
    ({"ode/time": 9.0, "ode/loss": 9.0, "ode/edge_ratio_step": 9.0, "epoch": 1}, 8),
    ({"ode/time": 1.0, "ode/loss": 2.0, "ode/edge_ratio_step": NAN, "ode/sharpness": 3.0, "epoch": 1}, 8),
    ({"lr-SGD": 0.125}, 8),
    ({"ode/time": 1.5, "ode/loss": 1.0, "ode/edge_ratio_step": -0.5, "epoch": 1}, 12),
    ({"val/loss": 1.5, "val/accuracy": 0.75, "epoch": 1}, 12),
]
READ = {
    "step": [3, 4, 6, 8, 12],
    "lr-SGD": [NAN, NAN, NAN, 0.125, NAN],
    "ode/edge_ratio_step": [NAN, 0.25, NAN, NAN, -0.5],
    "ode/loss": [NAN, 4.0, NAN, 2.0, 1.0],
    "ode/sharpness": [NAN, NAN, NAN, 3.0, NAN],
    "ode/time": [NAN, 0.5, NAN, 1.0, 1.5],
    "train/loss": [4.0, NAN, NAN, NAN, NAN],
    "val/loss": [NAN, NAN, 3.5, NAN, 1.5],
}
KINDS = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}


def write(kind, folder, version=0, logged=LOGGED):
    """A run's folder, written by Lightning's own logger."""
    logger = KINDS[kind](folder, name="run", version=version)
    for values, step in logged:
        logger.log_metrics(values, step)
    logger.save()
    logger.finalize("success")
    return folder / f"run/version_{version}"


def log_of(folder):
    found = [*folder.glob("metrics.csv"), *folder.glob("events*")]
    assert len(found) == 1
    return found[0]


def sgd_run(n=40, every=10):
    """Columns with every quantity of a run of SGD whose edge ratio passes 1."""
    step = np.arange(1, n + 1) * every
    time = 0.05 * step
    loss = 2.0 * np.exp(-time / 4) + 1e-3
    wave = 1 + 0.1 * np.sin(step)
    probe = step % (5 * every) == 0
    return {
        "step": step,
        "ode/time": time,
        "ode/loss": loss,
        "ode/edge_ratio_step": 0.03 * time * wave - 0.05,
        "ode/edge_ratio": np.where(probe, 0.06 * time, NAN),
        "ode/sharpness": np.where(probe, 0.06 * time * 40, NAN),
        "ode/rel_local_error": 0.03 * time * wave,
        "ode/lr_for_tol": 0.05 / (1 + time) * wave,
        "ode/actual_dloss": -0.05 * loss * wave,
        "ode/predicted_dloss": -0.06 * loss,
        "ode/predicted2_dloss": -0.05 * loss,
        "ode/igr_term": 0.01 * loss * wave,
        "ode/igr_ratio": 0.01 * wave,
        "lr-SGD": np.full(n, 0.05),
        "train/loss": loss * wave,
        "val/loss": np.where(probe, 1.1 * loss + 0.1, NAN),
    }


ALL_LABELS = (
    "loss $L$ (unit of the task)",
    "edge ratio (dimensionless)",
    "sharpness (1 / learning rate)",
    "local error / step length\n(dimensionless)",
    "learning rate\n(1 / curvature)",
    "loss change in a step\n(unit of $L$)",
    "implicit term\n(unit of $L$)",
    "implicit term / $L$\n(dimensionless)",
)


def labels(figure):
    return tuple(axes.get_ylabel() for axes in figure.axes)


def curves(axes):
    """The curves of a panel by their name in the legend, as pairs of time and value."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


# Reading


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_log_reads_to_the_same_columns(tmp_path, kind):
    columns = read_columns(log_of(write(kind, tmp_path)))
    assert list(columns) == list(READ)
    for name, values in READ.items():
        np.testing.assert_array_equal(columns[name], values, err_msg=name)


def test_a_resumed_run_in_a_second_events_file_goes_on(tmp_path):
    folder = write("tensorboard", tmp_path, logged=[({"ode/time": float(t)}, t) for t in (1, 2, 3)])
    again = TensorBoardLogger(tmp_path, name="run", version=0)
    again.experiment.close()
    again._experiment = None
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), filename_suffix=".later") as writer:
        for t in (2, 3, 4):
            writer.add_scalar("ode/time", t + 0.5, t)
    columns = read_columns(folder)
    assert columns["step"].tolist() == [1, 2, 3, 4]
    assert columns["ode/time"].tolist() == [1, 2.5, 3.5, 4.5]


def test_a_row_cut_off_by_a_killed_run_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("ode/loss,ode/time,step\n2.0,0.5,1\n1.0,1.0,2\n0.5,1")
    assert read_columns(path)["ode/loss"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "metrics.csv is empty; give the metrics.csv that"),
        ("epoch,ode/loss\n0,1\n", "metrics.csv has no column 'step'; give"),
        ("step,ode/loss,ode/time\n1,2,3\n2,two,4\n", "metrics.csv, line 3: 'two' is not a number"),
        (
            "step,epoch,train/loss\n1,0,2\n",
            r"metrics.csv: nothing to draw, for none of ode/loss.*Add ODEDiagnostics\(\)",
        ),
        ("step,ode/loss,ode/time\n1,nan,0\n", "metrics.csv: nothing to draw"),
        ("step,ode/grad_norm,ode/time\n1,2,3\n", "metrics.csv: nothing to draw"),
        ("step,ode/loss,ode/time\n", "metrics.csv: nothing to draw"),
    ],
)
def test_a_log_without_what_is_needed_says_so(tmp_path, text, told):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(ValueError, match=told):
        plot_ode_diagnostics(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_damaged_events_file_says_so(tmp_path):
    path = tmp_path / "events.out.tfevents.1.host"
    path.write_bytes(b"not an events file" * 10)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_ode_diagnostics(path)


def test_without_tensorboard_its_log_says_what_to_do_and_a_csv_is_drawn(tmp_path, monkeypatch):
    events, table = write("tensorboard", tmp_path), write("csv", tmp_path, version=1)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="TensorBoard, which is not installed: pip install tensorboard, or"):
        plot_ode_diagnostics(events)
    assert plot_ode_diagnostics(table).is_file()


# Finding the log


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_above_has_its_newest_version_drawn_beside_the_log(tmp_path, kind):
    for version in (2, 10, 9):
        write(kind, tmp_path, version)
    (tmp_path / "run/version_11").mkdir()  # a run that logged nothing
    (tmp_path / "run/version_12b").mkdir()
    for run in (tmp_path, tmp_path / "run", tmp_path / "run/version_10", log_of(tmp_path / "run/version_10")):
        picture = plot_ode_diagnostics(run)
        assert picture == tmp_path / "run/version_10/ode_diagnostics.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()


def test_of_several_folders_of_runs_the_one_written_last_counts(tmp_path):
    write("csv", tmp_path / "first", version=7)
    write("csv", tmp_path / "second", version=0)
    assert plot_ode_diagnostics(tmp_path) == tmp_path / "second/run/version_0/ode_diagnostics.png"


def test_what_is_no_run_says_what_to_give(tmp_path):
    (tmp_path / "hparams.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"no run is called '.*nowhere': give a run's folder"):
        plot_ode_diagnostics(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither metrics.csv nor events files: train with CSVLogger or"):
        plot_ode_diagnostics(tmp_path)
    with pytest.raises(ValueError, match=r"hparams.yaml' is no log: give a metrics.csv"):
        plot_ode_diagnostics(tmp_path / "hparams.yaml")


# Writing


def test_the_ending_decides_the_format(tmp_path):
    run = write("csv", tmp_path)
    page = plot_ode_diagnostics(run, tmp_path / "new/folder/page.pdf").read_bytes()
    assert page.startswith(b"%PDF") and b"/Type3" not in page
    assert b"<svg" in plot_ode_diagnostics(str(run), str(tmp_path / "page.svg")).read_bytes()
    for name in ("page", "page.txt", "metrics.csv"):
        with pytest.raises(ValueError, match=rf"output must end in .png, .pdf or .svg, got '.*{name}'"):
            plot_ode_diagnostics(run, tmp_path / name)


# Panels


def test_a_run_of_sgd_has_every_panel():
    assert labels(ode_figure(sgd_run())) == ALL_LABELS


@pytest.mark.parametrize(
    ("lacking", "panels"),
    [
        (("igr", "lr_for", "rel_local"), (0, 1, 2, 5)),  # Adam
        (("lr_for", "rel_local"), (0, 1, 2, 5, 6, 7)),  # momentum
        (("edge", "sharp"), (0, 3, 4, 5, 6, 7)),
        (("loss", "dloss"), (1, 2, 3, 4, 6, 7)),  # a training loss alone makes no panel
        (("igr", "lr_for", "rel_local", "edge", "sharp", "predicted2", "actual"), (0, 5)),  # an unknown optimiser
    ],
)
def test_a_panel_without_a_value_is_left_out(lacking, panels):
    columns = sgd_run()
    for name in columns:
        if any(name.startswith(f"ode/{word}") for word in lacking) or ("loss" in lacking and name.endswith("dloss")):
            columns[name] = np.full(len(columns["step"]), NAN)
    figure = ode_figure(columns)
    assert labels(figure) == tuple(ALL_LABELS[i] for i in panels)
    assert all(axes.lines for axes in figure.axes)


def test_curves_hold_the_columns_and_losses_find_the_flow_time_of_their_step():
    figure = ode_figure(READ)
    loss, edge, sharpness = figure.axes
    assert curves(loss) == {
        "probed batch": [[0.5, 4.0], [1.0, 2.0], [1.5, 1.0]],
        "training": [[0.375, 4.0]],  # one step before the first known time, at its rate of 0.5 in 4 steps
        "validation": [[0.75, 3.5], [1.5, 1.5]],
    }
    assert curves(edge) == {"along the step": [[0.5, 0.25], [1.5, -0.5]], "limit": edge.lines[1].get_xydata().tolist()}
    assert set(edge.lines[1].get_ydata()) == {1}
    assert list(curves(sharpness).values()) == [[[1.0, 3.0]]]
    assert {axes.get_xlabel() for axes in figure.axes} == {"", "flow time (1 / curvature)"}


def test_the_limit_of_the_sharpness_is_sharpness_over_edge_ratio():
    columns = {"step": [1, 2, 3], "ode/time": [1, 2, 3], "ode/sharpness": [8, 16, 0], "ode/edge_ratio": [0.2, 0.8, 0]}
    assert curves(ode_figure(columns).axes[1])["limit"] == [[1, 40], [2, 20]]


def test_a_loss_far_from_any_known_flow_time_is_not_drawn():
    columns = {
        "step": [10, 20, 30, 35, 41],
        "ode/time": [1, 2, 3, NAN, NAN],
        "ode/loss": [3, 2, 1, NAN, NAN],
        "val/loss": [NAN, NAN, NAN, 5, 6],
    }
    assert curves(ode_figure(columns).axes[0])["validation"] == [[3.5, 5]]


@pytest.mark.parametrize(
    ("names", "drawn"),
    [
        (("train/loss", "train/loss_step", "train/loss_epoch"), "train/loss"),
        (("train_loss_step", "train_loss_epoch"), "train_loss_step"),
        (("training.loss",), "training.loss"),
        (("train/loss_margin", "train/margin_loss", "loss"), None),
    ],
)
def test_which_column_is_the_training_loss(names, drawn):
    columns = {"step": [1, 2], "ode/time": [1, 2], "ode/loss": [7, 7]}
    columns |= {name: [i, i] for i, name in enumerate(names)}
    found = curves(ode_figure(columns).axes[0])
    assert ("training" in found) == (drawn is not None)
    if drawn:
        assert found["training"][0][1] == names.index(drawn)


def test_without_flow_time_the_panels_are_over_steps():
    figure = ode_figure({"step": [10, 20], "ode/loss": [2, 1]})
    assert curves(figure.axes[0]) == {"probed batch": [[10, 2], [20, 1]]}
    assert figure.axes[0].get_xlabel() == "step"


def test_with_learning_rates_of_several_optimisers_none_is_said_to_be_used():
    columns = sgd_run()
    assert "used" in curves(ode_figure(columns).axes[4])
    assert "used" not in curves(ode_figure(columns | {"lr-Adam": columns["lr-SGD"]}).axes[4])


def test_steps_must_increase():
    with pytest.raises(ValueError, match="'step' must increase"):
        ode_figure({"step": [1, 1], "ode/loss": [1, 2]})


def test_infinite_and_missing_values_are_no_points():
    columns = {"step": [1, 2, 3], "ode/time": [1, 2, 3], "ode/loss": [1, np.inf, NAN]}
    assert curves(ode_figure(columns).axes[0]) == {"probed batch": [[1, 1]]}


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 2.0, 5.0], "linear"),
        ([1.0, 1.0, 1.0], "linear"),
        ([0.0, 0.0, 0.0], "linear"),
        ([1.0, 0.1, 0.001], "log"),
        ([-0.1, 0.4, 1.2], "linear"),
        ([1.0, 0.1, 0.001, 0.0], "symlog"),
        ([-1.0, -0.1, -0.001, -0.0001, -0.00001], "symlog"),
    ],
)
def test_scale_is_logarithmic_where_values_span_decades(values, scale):
    step = np.arange(len(values)) + 1
    figure = ode_figure({"step": step, "ode/time": step, "ode/loss": values})
    assert figure.axes[0].get_yscale() == scale
    figure.draw_without_rendering()  # ticks and labels raise no warning


def test_many_points_become_medians_in_a_band_that_hides_no_value():
    rng = np.random.default_rng(0)
    step = np.arange(1200)
    values = rng.normal(size=1200)
    figure = ode_figure({"step": step, "ode/time": step, "ode/edge_ratio_step": values})
    line, band = figure.axes[0].lines[0].get_xydata(), figure.axes[0].collections[0].get_paths()[0].vertices
    parts = np.array_split(values, 120)  # the steps are even, so an interval has ten of them
    np.testing.assert_allclose(line[:, 1], [np.median(part) for part in parts], rtol=1e-12)
    assert {part.min() for part in parts} | {part.max() for part in parts} <= set(band[:, 1])
    assert "medians" in figure.get_supxlabel()


# The page


@cache
def page(name):
    """The drawn page of a run in PAGES, with the outer box of each panel."""
    figure = ode_figure(PAGES[name])
    figure.draw_without_rendering()
    return figure, [axes.get_tightbbox() for axes in figure.axes]


PAGES = {
    "all": sgd_run(),
    "long": sgd_run(n=2000, every=1),
    "short": sgd_run(n=5),
    "one point": sgd_run(n=1),
    "seven panels": {name: values for name, values in sgd_run().items() if name != "ode/igr_ratio"},
    "one panel": {name: values for name, values in sgd_run().items() if name in ("step", "ode/time", "ode/loss")},
    "tiny": {name: values * (1e-9 if "/" in name else 1) for name, values in sgd_run().items()},
    "huge": {name: values * (1e9 if "/" in name else 1) for name, values in sgd_run().items()},
}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_overlaps_and_nothing_is_cut_off(name):
    figure, boxes = page(name)
    note = [figure._supxlabel.get_window_extent()] if figure.get_supxlabel() else []
    assert not any(one.overlaps(other) for one, other in combinations(boxes + note, 2))
    corners = np.concatenate([box.get_points() for box in boxes + note])
    assert corners.min() >= -1 and np.all(corners.max(0) <= figure.bbox.max + 1)
    for axes in figure.axes:
        legend = [axes.get_legend()] if axes.get_legend() else []
        around = [artist.get_window_extent() for artist in (*axes.texts, axes.yaxis.label, *legend)]
        assert not any(one.overlaps(other) for one, other in combinations([*around, axes.bbox.padded(-2)], 2))


@pytest.mark.parametrize("name", PAGES)
def test_an_axis_has_numbers_that_do_not_touch(name):
    figure, _ = page(name)
    for axes in figure.axes:
        low, high = sorted(axes.get_ylim())
        shown = [
            tick.label1.get_window_extent()
            for tick in axes.yaxis.get_major_ticks()
            if low <= tick.get_loc() <= high and tick.label1.get_text()
        ]
        assert len(shown) >= 2
        below = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_visible()]
        assert not any(one.overlaps(other) for one, other in combinations(shown + below, 2))


def test_curves_of_a_panel_differ_in_colour_and_in_grey_and_letters_can_be_read():
    figure, _ = page("all")
    assert figure.get_figwidth() <= 7.5 and figure.get_figheight() <= 10  # A4 and letter without their margins
    for axes in figure.axes:
        for kind in ([line.get_marker() for line in axes.lines], [to_rgb(line.get_color()) for line in axes.lines]):
            assert len(set(kind)) == len(axes.lines)
        texts = [axes.yaxis.label, *axes.get_yticklabels(), *(axes.get_legend().texts if axes.get_legend() else [])]
        assert min(text.get_fontsize() for text in texts) >= 7


def test_the_figure_is_no_window_and_goes_to_any_logger():
    from lightning_plugins.core.logging import figure_to_image

    figure = ode_figure(sgd_run())
    assert figure.canvas.manager is None
    image = figure_to_image(figure)
    assert image.shape == (3, 1720, 1440)
    assert image.mean() > 0.85
