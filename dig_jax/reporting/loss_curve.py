"""Series of numbers from metrics.jsonl, and loss.png."""

import os

import numpy as np
from jaxtyping import Float

from dig_jax.files.atomic import replacing
from dig_jax.files.jsonl import Row, read_rows

_CURVES = {
    "loss": {"label": "train", "color": "#1f5fa8", "linewidth": 1.8, "zorder": 3},
    "heldout_loss": {
        "label": "held-out",
        "color": "#d95f02",
        "linewidth": 0.8,
        "marker": "o",
        "markersize": 4,
        "zorder": 4,
    },
    "loss_q1": {"label": "timesteps 0 to ¼", "color": "#7fbf7b", "linewidth": 0.9},
    "loss_q2": {"label": "timesteps ¼ to ½", "color": "#5aa3a8", "linewidth": 0.9},
    "loss_q3": {"label": "timesteps ½ to ¾", "color": "#8a7cb8", "linewidth": 0.9},
    "loss_q4": {"label": "timesteps ¾ to 1", "color": "#c27ba0", "linewidth": 0.9},
}


def read_metrics(path: str | os.PathLike) -> list[Row]:
    """Return one row per step, in order of steps; if a step was logged twice, its last values count.

    Raises:
        OSError: the file cannot be read.
    """
    by_step: dict[int, Row] = {}
    for row in read_rows(path):
        by_step.setdefault(row["step"], {}).update(row)
    return [by_step[step] for step in sorted(by_step)]


def series(
    rows: list[Row], name: str, *, positive: bool = False
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return the steps and values where a metric is finite, and positive if asked."""
    # A file that was edited may hold anything.
    points = [(row["step"], row[name]) for row in rows if type(row.get(name)) in (int, float)]
    steps, values = np.array(points, float).reshape(-1, 2).T
    drawable = np.isfinite(values) & ((values > 0) | (not positive))
    return steps[drawable], values[drawable]


def smooth(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the centered mean over 1/25 of the curve; the window is clipped at the ends."""
    window = np.ones(2 * (len(values) // 50) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def save_loss_curve(path: str | os.PathLike, metrics_path: str | os.PathLike) -> None:
    """Draw the losses in a metrics file over the steps, on a logarithmic axis.

    The losses are "loss", "heldout_loss" and "loss_q1" … "loss_q4" (quarters of the timesteps, from the data
    to the noise).

    Raises:
        ValueError: the file holds no loss.
        OSError: the metrics cannot be read or the picture cannot be written.
    """
    # Imported here because importing Matplotlib is slow.
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_path)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(yscale="log", xlabel="step", ylabel="loss")
    for name, style in _CURVES.items():
        steps, losses = series(rows, name, positive=True)
        if not len(steps):
            continue
        axes.plot(steps, losses if name == "heldout_loss" else smooth(losses), **style)
        if name == "loss":
            axes.plot(steps, losses, ".-", color=style["color"], markersize=2, linewidth=0.6, alpha=0.25)
    if not axes.lines:
        raise ValueError(f"no losses in {os.fspath(metrics_path)}")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2)
    with replacing(path) as file:
        figure.savefig(file, format="png")
