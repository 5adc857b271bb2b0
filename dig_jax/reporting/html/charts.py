"""Charts of metrics over steps as SVG in the colors of the page, and the numbers shown next to them."""

import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from dig_jax.reporting.loss_curve import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The page's light colors. In the SVG, CSS variables replace them, so that the page can be dark, too.
COLORS = {
    "dim": "#667085",
    "edge": "#dfe3ea",
    "c0": "#1f5fa8",
    "c1": "#d95f02",
    "c2": "#4f9d4a",
    "c3": "#2f8f96",
    "c4": "#7a68b3",
    "c5": "#b0608c",
}
# Size of the drawing in points, and the edges of the axes as fractions of it.
_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.11, 0.96, 0.11, 0.95
# Longer curves are thinned to _POINTS points; up to _DOTS exact values are marked by dots.
_POINTS, _DOTS = 240, 60

# Steps, means, minima and maxima of the stretches of a thinned curve.
_Thinned = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric over steps.

    color: a key of `COLORS`.
    noisy: draw the running mean over a faint band from the least to the greatest value.
    """

    label: str
    color: str
    steps: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    noisy: bool = False


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawn chart, for the page's template.

    legend: (label, color, latest value) of each curve.
    marks: (distance from the left edge in percent, text) of each marked step.
    hover: the numbers that the page's script shows under the pointer, as JSON.
    """

    title: str
    svg: str
    legend: list[tuple[str, str, str]]
    marks: list[tuple[float, str]]
    hover: dict[str, Any]


def number(value: float) -> str:
    """Format to three significant digits: 0.0412, 12.3k, 4.5M, 1e-6."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (10 * unit if letter == "k" else unit):
            return f"{value / unit:.3g}{letter}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def percent(value: float) -> str:
    """Format a fraction as percent."""
    return f"{100 * value:.3g} %"


def chart(
    title: str,
    curves: Iterable[Curve],
    *,
    logarithmic: bool = False,
    show: Callable[[float], str] = number,
    marks: Sequence[tuple[int, str]] = (),
) -> Chart | None:
    """Draw a chart; None if no curve has values.

    Args:
        title: includes the unit.
        curves: the first is drawn on top. Values on a logarithmic axis must be positive.
        logarithmic: use a logarithmic axis of values; a linear one includes 0.
        show: formats a value.
        marks: (step, text) of steps to mark.
    """
    # Imported here because importing Matplotlib is slow.
    import matplotlib
    from matplotlib.figure import Figure

    drawn = [(curve, *_thin(curve)) for curve in curves if len(curve.steps)]
    if not drawn:
        return None
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 10.5}):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72))
        axes = figure.add_axes((_LEFT, _BOTTOM, _RIGHT - _LEFT, _TOP - _BOTTOM))
        _draw(axes, drawn, logarithmic)
        _style(axes, show, logarithmic)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    first, last = map(float, axes.get_xlim())
    scale = (_RIGHT - _LEFT) / (last - first)
    return Chart(
        title=title,
        svg=_in_page_colors(file.getvalue()),
        legend=[(curve.label, curve.color, show(float(mean[-1]))) for curve, _, mean, *_ in drawn],
        marks=[(100 * (_LEFT + scale * (step - first)), text) for step, text in marks],
        hover={
            "x": [first, last, 100 * _LEFT, 100 * _RIGHT],
            "curves": [[steps.astype(int).tolist(), list(map(show, mean))] for _, steps, mean, *_ in drawn],
        },
    )


def _draw(axes: "Axes", drawn: Sequence[tuple[Curve, *_Thinned]], logarithmic: bool) -> None:
    """Draw the curves; their means determine the ranges of the axes."""
    axes.set(yscale="log" if logarithmic else "linear", xmargin=0, ymargin=0.08)
    for order, (curve, steps, mean, _, _) in enumerate(drawn):
        dots = len(steps) <= (1 if curve.noisy else _DOTS)
        axes.plot(
            steps,
            mean,
            color=COLORS[curve.color],
            linewidth=0.9 if dots else 1.8,
            marker="o" if dots else "",
            markersize=5,
            clip_on=not dots,
            zorder=3 - order / len(drawn),
        )
    axes.autoscale_view()
    first, last = axes.get_xlim()
    if last - first < 2:
        axes.set_xlim(first - 1, last + 1)
    if not logarithmic and axes.dataLim.y0 >= 0:
        axes.set_ylim(bottom=0)
    axes.autoscale(False)
    for curve, steps, _, low, high in drawn:
        if curve.noisy:
            axes.fill_between(steps, low, high, color=COLORS[curve.color], alpha=0.22, linewidth=0)


def _style(axes: "Axes", show: Callable[[float], str], logarithmic: bool) -> None:
    """Set the ticks, and hide the frame except for the axis of steps."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = axes.get_ylim()
    decades = math.log10(high / low) if logarithmic else 0
    subs = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 3.5 else (1,)
    axes.yaxis.set_major_locator(
        LogLocator(subs=subs, numticks=6) if logarithmic else MaxNLocator(5, steps=[1, 2, 5, 10])
    )
    axes.yaxis.set_major_formatter(lambda value, _: show(value))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()
    axes.grid(axis="y", color=COLORS["edge"])
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["dim"])
    axes.tick_params(color=COLORS["dim"], labelcolor=COLORS["dim"])
    axes.tick_params(axis="y", length=0)


def _in_page_colors(document: str) -> str:
    """Return the <svg> element of a document, with CSS variables in place of colors."""
    svg = document[document.index("<svg") :]
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg


def _thin(curve: Curve) -> _Thinned:
    """Return the steps, means, minima and maxima of at most `_POINTS` stretches of a curve."""
    count = len(curve.steps)
    edges = np.unique(np.linspace(0, count, min(count, _POINTS) + 1).astype(int))[:-1]
    lengths = np.diff(edges, append=count)
    means = np.add.reduceat(curve.values, edges) / lengths
    # Each stretch is drawn at its last step, so that the curve ends at the last step of the run.
    ends = curve.steps[edges + lengths - 1]
    low, high = np.minimum.reduceat(curve.values, edges), np.maximum.reduceat(curve.values, edges)
    return ends, smooth(means) if curve.noisy else means, low, high
