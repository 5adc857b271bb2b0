"""The content of the report, from the files of a workdir. The sections of missing files are omitted."""

import datetime
import functools
import importlib.resources
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dig_jax.config import Config, flattened, to_dict
from dig_jax.errors import InvalidFile
from dig_jax.files.atomic import replacing
from dig_jax.files.json_file import read_json
from dig_jax.files.jsonl import Row, read_rows
from dig_jax.reporting.html.charts import COLORS, Chart, Curve, chart, number, percent
from dig_jax.reporting.html.embedded_grids import embedded_grids
from dig_jax.reporting.loss_curve import read_metrics, series

if TYPE_CHECKING:
    from jinja2 import Template


def write_report(workdir: Path) -> None:
    """Write WORKDIR/report.html atomically.

    Raises:
        OSError: a file cannot be read or the report cannot be written.
    """
    rows, starts = read_metrics(workdir / "metrics.jsonl"), read_rows(workdir / "starts.jsonl")
    settings = _read_json(workdir / "config.json").get("config") or {}
    fields = flattened(settings)
    losses, charts = _charts(rows, starts)
    page = _template().render(
        name=workdir.absolute().name,
        colors=COLORS,
        subtitle=_subtitle(settings),
        tiles=_tiles(rows, settings),
        grids=embedded_grids(workdir),
        losses=losses,
        charts=charts,
        scores=flattened(_read_json(workdir / "scores.json")),
        config=fields,
        changed=_changed(fields),
        starts=[_start(start) for start in reversed(starts)],
    )
    with replacing(workdir / "report.html") as file:
        file.write(page.encode(errors="replace"))  # names of files need not be UTF-8


@functools.cache
def _template() -> "Template":
    # Imported here so that `main.py --help` does not wait for it.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["short"] = lambda value: f"{value:.5g}" if isinstance(value, float) else str(value)
    source = importlib.resources.files(__name__.rpartition(".")[0]).joinpath("report.html").read_text("utf-8")
    return environment.from_string(source)


def _subtitle(settings: Mapping[str, Any]) -> str:
    model, data = (settings.get(group, {}).get("name") for group in ("model", "data"))
    written = f"written {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    return " · ".join(filter(None, [model, data and f"on {data}", written]))


def _tiles(rows: list[Row], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, value) of the latest figures."""
    tiles = []
    if rows:
        steps = settings.get("training", {}).get("steps")
        tiles.append(("step", f"{rows[-1]['step']:,}" + (f" of {steps:,}" if steps else "")))
    for label, metric, show in (
        ("latest loss", "loss", number),
        ("latest held-out loss", "heldout_loss", number),
        ("images/s", "images_per_second", number),
        ("MFU", "mfu", percent),
    ):
        _, values = series(rows, metric)
        if len(values):
            tiles.append((label, show(float(values[-1]))))
    if skipped := sum(row.get("skipped_steps") or 0 for row in rows):
        tiles.append(("skipped steps (not finite)", f"{skipped:,}"))
    return tiles


def _charts(rows: list[Row], starts: Iterable[Row]) -> tuple[list[Chart], list[Chart]]:
    """Return the charts of losses and the other charts, without charts of metrics that were not logged."""

    def curve(
        label: str, metric: str, color: str = "c0", *, positive: bool = False, noisy: bool = False
    ) -> Curve:
        return Curve(label, color, *series(rows, metric, positive=positive), noisy=noisy)

    losses = [
        curve("training", "loss", positive=True, noisy=True),
        curve("held-out", "heldout_loss", "c1", positive=True),
    ]
    quarters = [
        curve(f"timesteps {bounds}", f"loss_q{quarter}", f"c{quarter + 1}", positive=True, noisy=True)
        for quarter, bounds in enumerate(("0 to ¼", "¼ to ½", "½ to ¾", "¾ to 1"), 1)
    ]
    gradient = [curve("mean over steps", "grad_norm", positive=True, noisy=True)]
    utilization = [curve("MFU", "mfu"), curve("of the roofline", "roofline_share", "c1")]
    draw = functools.partial(chart, marks=_marks(rows, starts))
    loss_charts = [
        draw("Loss", losses, logarithmic=True),
        draw("Loss by noise level", quarters, logarithmic=True),
    ]
    charts = [
        draw("Images per second", [curve("all devices", "images_per_second", noisy=True)]),
        draw("Fraction of peak performance", utilization, show=percent),
        draw("Time spent waiting for data", [curve("fraction", "data_wait")], show=percent),
        draw("Peak memory per device, GiB", [curve("maximum over devices", "peak_memory_gib")]),
        draw("Gradient norm", gradient, logarithmic=True),
        draw("Learning rate", [curve("AdamW", "learning_rate")]),
    ]
    return [c for c in loss_charts if c], [c for c in charts if c]


def _marks(rows: list[Row], starts: Iterable[Row]) -> list[tuple[int, str]]:
    """Return (step, text) of the steps from which the run was resumed."""
    if not rows:
        return []
    return [
        (start["step"], f"resumed from step {start['step']:,}, {start.get('time', '')}")
        for start in starts
        if start["step"] and rows[0]["step"] <= start["step"] <= rows[-1]["step"]
    ]


def _changed(fields: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, value, default) of the fields that differ from their defaults."""
    defaults = flattened(to_dict(Config()))
    return [
        (name, value, defaults.get(name, "–"))
        for name, value in fields.items()
        if value != defaults.get(name)
    ]


def _start(start: Row) -> list[tuple[str, Any]]:
    """Return the rows of the table for one line of starts.jsonl."""
    versions = {"Python": start.get("python")} | (start.get("versions") or {})
    rows = {
        "from step": f"{start['step']:,}",
        **{name: start.get(name) for name in ("time", "command", "devices", "processes", "commit")},
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }
    return [(name, value) for name, value in rows.items() if value]


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, or an empty one if there is none."""
    try:
        return read_json(path)
    except (OSError, InvalidFile):
        return {}
