"""One page of pictures from a run of ODEDiagnostics: panels over flow time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_plugins.callbacks.ode_diagnostics.read_log import LOSS, find_log, read_columns
from lightning_plugins.core import arguments as must
from lightning_plugins.core.new_file import new_file
from lightning_plugins.core.pictures import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "ode_diagnostics.png"
_MAX_POINTS = 120  # more of them in a panel of 3 inches are a blot: bins then
_MAX_MARKERS = 12


class _Panel(NamedTuple):
    """Curves on one axis, as column and name in the legend; companions are drawn only beside a curve."""

    label: str
    curves: dict[str, str]
    companions: dict[str, str] = {}  # noqa: RUF012  never changed


_PANELS = (
    _Panel("loss $L$ (unit of the task)", {"ode/loss": "probed batch"}, {"val": "validation", "train": "training"}),
    _Panel(
        "edge ratio (dimensionless)",
        {"ode/edge_ratio": "sharpest direction", "ode/edge_ratio_step": "along the step"},
        {"one": "limit"},
    ),
    _Panel("sharpness (1 / learning rate)", {"ode/sharpness": "top eigenvalue"}, {"limit": "limit"}),
    _Panel("local error / step length\n(dimensionless)", {"ode/rel_local_error": ""}),
    _Panel("learning rate\n(1 / curvature)", {"ode/lr_for_tol": "allowed by the tolerance"}, {"lr": "used"}),
    _Panel(
        "loss change in a step\n(unit of $L$)",
        {
            "ode/actual_dloss": "actual",
            "ode/predicted_dloss": "predicted, 1st order",
            "ode/predicted2_dloss": "2nd order",
        },
    ),
    _Panel("implicit term\n(unit of $L$)", {"ode/igr_term": ""}),
    _Panel("implicit term / $L$\n(dimensionless)", {"ode/igr_ratio": ""}),
)
DRAWN = tuple(name for panel in _PANELS for name in panel.curves)
# Okabe and Ito's colours, which the colour-blind tell apart; line and marker tell them apart in grey.
_STYLES = (
    {"color": "black", "linestyle": "-", "marker": "o", "markerfacecolor": "black"},
    {"color": "#D55E00", "linestyle": (0, (5, 2)), "marker": "s", "markerfacecolor": "white"},
    {"color": "#0072B2", "linestyle": (0, (1, 1.2)), "marker": "^", "markerfacecolor": "white"},
)
_TRAINING = {"color": "0.6", "linestyle": "-", "linewidth": 0.8, "marker": ".", "zorder": 1.5}
_REFERENCE = {"color": "#009E73", "linestyle": (0, (8, 2, 1, 2)), "marker": "x", "zorder": 3}


def plot_ode_diagnostics(run: str | Path, output: str | Path | None = None, optimizer_index: int = 0) -> Path:
    """Draw what ODEDiagnostics logged in a run on one page of panels over flow time.

    Args:
        run: a CSV file of Lightning's CSVLogger, a TensorBoard events file, or a folder with either, which may be the
            run's own or one above, of whose runs the newest version_N counts.
        output: file to write, in the format of its ending, such as .png, .pdf or .svg; an existing picture is replaced.
            By default it is ode_diagnostics.png beside the log.
        optimizer_index: place of the optimizer whose rows are drawn, as ODEDiagnostics was given it; 0 by default,
            which is right for a run with one optimizer.

    Returns:
        The picture's path.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the log holds nothing to draw or cannot be read, or the ending is unknown.
        ModuleNotFoundError: the log is TensorBoard's, and tensorboard is not installed.
    """
    import matplotlib
    from matplotlib.backend_bases import FigureCanvasBase

    must.check(locals(), run=must.path, output=must.optional(must.path), optimizer_index=must.whole(0))
    log = find_log(Path(run))
    target = Path(output) if output is not None else (log if log.is_dir() else log.parent) / NAME
    if target.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"output must end in .png, .pdf or .svg, got {str(target)!r}.")
    columns = read_columns(log, optimizer_index)
    try:
        figure = ode_figure(columns)
    except ValueError as error:
        raise ValueError(f"{log}: {error} It was read for optimizer_index={optimizer_index}.") from error
    with matplotlib.rc_context({"pdf.fonttype": 42}), new_file(target) as file:  # letters: publishers refuse type 3
        figure.savefig(file, format=target.suffix[1:])
    return target


def ode_figure(columns: Mapping[str, Sequence[float] | np.ndarray]) -> "Figure":
    """The page of panels; a panel whose quantity has no value is left out.

    Losses that were logged at other steps are put at the flow time of their step, by interpolation.

    Args:
        columns: a table with one row for each of N increasing steps, each column ``(N,)`` with NaN where nothing was
            logged. ``step`` is required; ``ode/...`` as ODEDiagnostics logs them, losses such as ``train/loss`` and
            ``val/loss``, and ``lr-...`` of LearningRateMonitor are drawn, others are not. Without ``ode/time`` the
            panels are over steps.

    Raises:
        ValueError: no column of ``DRAWN`` has a value, or the steps do not increase.
    """
    table = {name: np.asarray(values, dtype=float) for name, values in columns.items()}
    if np.any(np.diff(table["step"]) <= 0):
        raise ValueError("the column 'step' must increase from row to row.")
    time, time_label = _flow_time(table)
    table |= _companions(table)
    has_value = {name for name, values in table.items() if np.any(np.isfinite(values) & np.isfinite(time))}
    panels = [panel for panel in _PANELS if has_value & panel.curves.keys()]
    if not panels:
        cure = "Add ODEDiagnostics() to the Trainer's callbacks, and train past its first logged step."
        raise ValueError(f"nothing to draw, for none of {', '.join(DRAWN)} has a value. {cure}")
    rows, odd = (len(panels) + 1) // 2, len(panels) % 2
    figure = new_figure(7.2, 0.4 + 2.05 * rows, dpi=200)
    grid = figure.add_gridspec(rows, 2)
    places = [grid[0, :]] * odd + [grid[i // 2, i % 2] for i in range(2 * odd, 2 * rows)]
    for letter, panel, place in zip("abcdefgh", panels, places, strict=False):
        axes = figure.add_subplot(place, sharex=figure.axes[0] if figure.axes else None)
        _draw_panel(axes, panel, {name: table[name] for name in has_value}, time)
        left = {"xytext": (-38, 5), "xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(letter, (0, 1), **left, fontsize=9, fontweight="bold")
        bottom = place.rowspan.stop == rows
        axes.tick_params(labelbottom=bottom or len(place.colspan) == 2)  # narrow panels share the numbers at the bottom
        axes.set_xlabel(time_label if bottom else "", fontsize=8)
    figure.align_ylabels()
    if any(axes.collections for axes in figure.axes):
        figure.supxlabel("Lines: medians of short intervals. Bands: least to greatest value.", fontsize=6.5)
    return figure


def _flow_time(table: Mapping[str, np.ndarray]) -> tuple[np.ndarray, str]:
    """Flow time of every row, and the axis's label; NaN more than one interval before or after the known ones."""
    step, known = table["step"], np.isfinite(table.get("ode/time", np.array([])))
    if not known.any():
        return step, "step"
    steps, times = step[known], table["ode/time"][known]
    if len(steps) > 1:
        steps = np.concatenate([[2 * steps[0] - steps[1]], steps, [2 * steps[-1] - steps[-2]]])
        times = np.concatenate([[max(0.0, 2 * times[0] - times[1])], times, [2 * times[-1] - times[-2]]])
    return np.interp(step, steps, times, left=np.nan, right=np.nan), "flow time (1 / curvature)"


def _companions(table: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the panels show beside their own curves, under the names they use for it."""
    found = {"one": np.ones_like(table["step"])}
    for name in sorted(filter(LOSS.fullmatch, table), key=len, reverse=True):  # the plain name, if any, comes last
        found["val" if name.startswith("val") else "train"] = table[name]
    rates = [name for name in table if name.startswith("lr-")]
    if len(rates) == 1:  # with several it is not known which of them the probed optimiser has
        found["lr"] = table[rates[0]]
    if {"ode/sharpness", "ode/edge_ratio"} <= table.keys():
        ratio = np.where(table["ode/edge_ratio"] == 0, np.nan, table["ode/edge_ratio"])
        found["limit"] = table["ode/sharpness"] / ratio
    return found


def _draw_panel(axes: "Axes", panel: _Panel, table: Mapping[str, np.ndarray], time: np.ndarray) -> None:
    styles = dict(zip(panel.curves, _STYLES, strict=False)) | {"val": _STYLES[1], "train": _TRAINING}
    shown: list[np.ndarray] = []
    for name, label in (panel.curves | panel.companions).items():
        if name not in table:
            continue
        there = np.isfinite(table[name]) & np.isfinite(time)
        style = {"label": label, **styles.get(name, _REFERENCE)}
        _draw_curve(axes, time[there], table[name][there], style, shift=len(shown) / 3)
        shown.append(table[name][there])
    _set_scale(axes, np.concatenate(shown))
    axes.set_ylabel(panel.label, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_formatter("{x:g}")  # no power of ten beside the axis
    axes.locator_params(axis="x", nbins=6)
    axes.grid(color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if any(panel.curves.values()):  # above the axes, where no curve is
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.2, "borderpad": 0.2}
        axes.legend(**place, ncols=3, fontsize=7, frameon=False, handlelength=2.4, columnspacing=1.0, handletextpad=0.5)


def _draw_curve(axes: "Axes", time: np.ndarray, values: np.ndarray, style: dict[str, Any], shift: float) -> None:
    """A line with a few markers, shifted so that those of several curves do not hide each other."""
    if len(values) > _MAX_POINTS:
        time, low, values, high = _binned(time, values)
        if np.any(low < high):
            axes.fill_between(time, low, high, color=style["color"], alpha=0.15, linewidth=0)
    wanted = time[0] + (time[-1] - time[0]) * (np.arange(_MAX_MARKERS) + shift) / _MAX_MARKERS
    every = np.unique(np.searchsorted(time, wanted)).tolist() if len(time) > 2 * _MAX_MARKERS else None
    axes.plot(
        time, values, **{"linewidth": 1.2, "markersize": 3.2, "markeredgewidth": 0.8, "markevery": every, **style}
    )


def _binned(time: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Middle, least, median and greatest value of each interval of time that has any."""
    edges = np.linspace(time.min(), time.max(), _MAX_POINTS + 1)
    index = np.clip(np.searchsorted(edges, time, side="right") - 1, 0, _MAX_POINTS - 1)
    filled = np.unique(index)
    bins = [values[index == i] for i in filled]
    low, median, high = (np.array([reduce(part) for part in bins]) for reduce in (np.min, np.median, np.max))
    return (edges[filled] + edges[filled + 1]) / 2, low, median, high


def _set_scale(axes: "Axes", values: np.ndarray) -> None:
    """Logarithmic where the values span two decades; linear around zero if they reach or pass it."""
    size = np.abs(values[values != 0])
    spans = size.size and size.max() > 100 * (size.min() if values.min() >= 0 else np.median(size))
    if spans and values.min() > 0:
        axes.set_yscale("log")
    elif spans:
        small, large = np.log10(np.quantile(size, 0.1)), np.log10(size.max())
        axes.set_yscale("symlog", linthresh=10 ** max(np.floor(small), np.ceil(large) - 3), linscale=0.5)
    else:
        axes.yaxis.set_major_formatter("{x:g}")  # nor above it, where the legend is
