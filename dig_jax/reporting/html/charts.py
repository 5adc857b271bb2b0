"""Curves over steps as SVG in the colours of the page, and the numbers that the page shows on them."""

import dataclasses
import html
import json
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float

from dig_jax.reporting.loss_curve import smooth

# Of the drawing, in its own units, which are pixels where it is 460 wide.
_WIDTH, _HEIGHT = 460, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 18, 10, 24
# A curve has so many points at most, and dots where it has no more than these.
_POINTS, _DOTS = 240, 60


@dataclasses.dataclass(frozen=True)
class Curve:
    """A quantity over steps.

    colour: a CSS variable of the page, without its dashes.
    noisy: the mean is drawn strong, and what it is the mean of is drawn faint.
    dots: each value is a dot, where there are few.
    """

    label: str
    colour: str
    steps: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    noisy: bool = False
    dots: bool = False


def chart(
    title: str,
    curves: Iterable[Curve],
    *,
    logarithmic: bool = False,
    show: Callable[[float], str] | None = None,
    marks: Sequence[tuple[int, str]] = (),
) -> str:
    """A figure with its title, legend and axes; empty where there is nothing to draw.

    Args:
        title: with the unit.
        curves: the first is drawn on top; those without values are left out. On a logarithmic axis all are
            positive.
        logarithmic: the axis of values; else it begins at 0.
        show: writes a value; by default to three digits.
        marks: steps to be marked on the axis, and what is told of each.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return ""
    thinned = [_thin(curve) for curve in curves]
    x = _Axis.of([steps for steps, *_ in thinned], _LEFT, _WIDTH - _RIGHT, rounded=False)
    y = _Axis.of([mean for _, mean, *_ in thinned], _HEIGHT - _BOTTOM, _TOP, logarithmic=logarithmic)
    parts = [*_grid(x, y, show or number)]
    for curve, (steps, mean, low, high) in reversed(list(zip(curves, thinned, strict=True))):
        across = x.place(steps)
        if curve.noisy and len(steps) > 2:
            between = np.stack([low, high], axis=1).reshape(-1)
            parts.append(_line(across.repeat(2), y.place(between), curve.colour, "faint"))
        if len(steps) > 1:
            parts.append(_line(across, y.place(mean), curve.colour, "thin" if curve.dots else "strong"))
        if (curve.dots and len(steps) <= _DOTS) or len(steps) == 1:
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="var(--{curve.colour})"/>'
                for a, b in zip(across, y.place(mean), strict=True)
            ]
    for step, text in marks:
        at = float(x.place(np.array([step], float))[0])
        parts.append(
            f'<path class="mark" d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}">'
            f"<title>{html.escape(text)}</title></path>"
        )
    legend = "".join(
        f'<span><i style="background:var(--{curve.colour})"></i>{html.escape(curve.label)}'
        f"<b>{(show or number)(float(mean[-1]))}</b></span>"
        for curve, (_, mean, *_) in zip(curves, thinned, strict=True)
    )
    data = {
        "x": [x.low, x.high, x.start, x.end],
        "curves": [
            [steps.astype(int).tolist(), [(show or number)(value) for value in mean.tolist()]]
            for steps, mean, *_ in thinned
        ],
    }
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}<em></em></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)} over steps">'
        f'{"".join(parts)}<line class="cursor" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/></svg>'
        f'<div class="legend">{legend}</div>'
        f'<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script></figure>'
    )


def number(value: float) -> str:
    """Three digits, as short as they can be: 0.0412, 12.3k, 4.5M, 1e-6."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (10 * unit if letter == "k" else unit):
            return f"{value / unit:.3g}{letter}"
    if abs(value) >= 1000:
        return f"{value:.0f}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def percent(value: float) -> str:
    """A share, of which two digits count."""
    return f"{100 * value:.3g} %"


@dataclasses.dataclass(frozen=True)
class _Axis:
    """From values to places in the drawing, and back."""

    low: float
    high: float
    start: int
    end: int
    logarithmic: bool = False

    @classmethod
    def of(
        cls,
        values: Iterable[np.ndarray],
        start: int,
        end: int,
        *,
        logarithmic: bool = False,
        rounded: bool = True,
    ) -> "_Axis":
        """The axis that shows all these values; of one value, with room around it."""
        everything = np.concatenate(list(values))
        low, high = float(everything.min()), float(everything.max())
        if logarithmic:
            room = (high / low) ** 0.06 if high > 1.3 * low else 1.2
            low, high = low / room, high * room
        elif rounded:
            low, high = min(low, 0.0), max(high, 0.0)
            low, high = 1.05 * low, 1.05 * high if high > low else 1.0
        elif high == low:
            low, high = low - 1, high + 1
        return cls(low, high, start, end, logarithmic)

    def place(self, values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Where values stand; those beyond the axis, at its end."""
        low, high, values = self.low, self.high, np.clip(values, self.low, self.high)
        if self.logarithmic:
            low, high, values = math.log(low), math.log(high), np.log(values)
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """About so many round values."""
        decades = math.log10(self.high / self.low) if self.logarithmic else 0
        if decades > count:
            stride = math.ceil(decades / count)
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1, stride)
            return [10.0**power for power in powers]
        if self.logarithmic and decades > 0.7:
            digits = (1, 2, 5) if decades < count / 2 else (1,) if decades > count / 1.5 else (1, 3)
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return self._within(digit * 10.0**power for power in powers for digit in digits)
        rough = (self.high - self.low) / count
        unit = 10.0 ** math.floor(math.log10(rough))
        stride = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= rough)
        first, last = math.ceil(self.low / stride), math.floor(self.high / stride)
        return [float(f"{index * stride:.6g}") for index in range(first, last + 1)]

    def _within(self, values: Iterable[float]) -> list[float]:
        return [value for value in values if self.low <= value <= self.high]


def _grid(x: _Axis, y: _Axis, show: Callable[[float], str]) -> Iterable[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value, at in _placed(y, 5):
        yield f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>'
        yield f'<text x="{_LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{show(value)}</text>'
    steps = list(_placed(x, 6))
    short = len({number(value) for value, _ in steps}) == len(steps)
    for value, at in steps:
        label = number(value) if short else f"{value:,.0f}"
        yield f'<path class="axis" d="M{at:.1f} {bottom}v4"/>'
        yield f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
    yield f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>'


def _placed(axis: _Axis, count: int) -> Iterable[tuple[float, float]]:
    ticks = axis.ticks(count)
    return zip(ticks, axis.place(np.array(ticks, float)).tolist(), strict=True)


def _line(x: np.ndarray, y: np.ndarray, colour: str, kind: str) -> str:
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{kind}" stroke="var(--{colour})" points="{points}"/>'


def _thin(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, least and greatest values of at most `_POINTS` stretches of the curve."""
    count = len(curve.steps)
    edges = np.unique(np.linspace(0, count, min(count, _POINTS) + 1).astype(int))[:-1]
    lengths = np.diff(edges, append=count)
    steps, values = curve.steps, curve.values
    means = np.add.reduceat(values, edges) / lengths
    # A stretch stands at its last step, so that the curve ends where the run has come to.
    ends = steps[edges + lengths - 1]
    low, high = np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)
    return ends, smooth(means) if curve.noisy else means, low, high
