"""The report's sections, from the files of a workdir; what is not there is left out."""

import datetime
import html
import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dig_jax.config import flattened
from dig_jax.files.atomic import replacing
from dig_jax.files.jsonl import read_rows
from dig_jax.reporting.html.assets import SCRIPT, STYLE
from dig_jax.reporting.html.charts import Curve, chart, number, percent
from dig_jax.reporting.html.samples import sample_grids
from dig_jax.reporting.loss_curve import read_metrics, series

Records = list[dict[str, Any]]


def write_report(workdir: Path) -> None:
    """Writes WORKDIR/report.html whole or not at all.

    Raises:
        OSError: it cannot be written; an older one then stays as it is.
    """
    records = read_metrics(workdir / "metrics.jsonl")
    settings = (_json(workdir / "config.json").get("config")) or {}
    starts, scores = read_rows(workdir / "starts.jsonl"), _json(workdir / "scores.json")
    name = workdir.absolute().name
    loss, noise_levels, *others = _charts(records, starts)
    samples = _samples(workdir)
    beginning = f"<div class=split>{samples}<div class=stack>{loss}{noise_levels}</div></div>"
    sections = [
        f"<h1>{_text(name)}</h1>{_state(records, settings)}",
        _section("Samples over time, and the loss", beginning, samples or loss),
        _section("Curves", f"<div class=charts>{''.join(others)}</div>", any(others)),
        _section("Scores", _table(scores.items()), scores),
        _section("Config", _config(settings), settings),
        _section("Starts", "".join(map(_start, reversed(starts))), starts),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(name)}</title><style>{STYLE}</style></head><body>"
        f"{''.join(sections)}<script>{SCRIPT}</script></body></html>\n"
    )
    with replacing(workdir / "report.html") as file:
        file.write(page.encode())


def _state(records: Records, settings: Mapping[str, Any]) -> str:
    """How far the run has come, in a line and a few figures."""
    now = datetime.datetime.now(datetime.UTC)
    model, data = (settings.get(group, {}) for group in ("model", "data"))
    line = [model.get("name"), data.get("name") and f"on {data['name']}", f"written {now:%Y-%m-%d %H:%M} UTC"]
    tiles = []
    if records:
        last, steps = records[-1]["step"], settings.get("training", {}).get("steps")
        tiles.append(("step", f"{last:,}" + (f" of {steps:,}" if steps else "")))
    for label, field, show in (
        ("latest loss", "loss", number),
        ("latest held-out loss", "heldout_loss", number),
        ("images/s", "images_per_second", number),
        ("MFU", "mfu", percent),
    ):
        _, values = series(records, field)
        if len(values):
            tiles.append((label, show(float(values[-1]))))
    skipped = sum(record.get("skipped_steps") or 0 for record in records)
    if skipped:
        tiles.append(("steps skipped, not finite", f"{skipped:,}"))
    body = "".join(
        f"<div><span class=dim>{_text(label)}</span><b>{value}</b></div>" for label, value in tiles
    )
    return f"<p class=dim>{_text(' · '.join(filter(None, line)))}</p><div class=tiles>{body}</div>"


def _samples(workdir: Path) -> str:
    grids = sample_grids(workdir)
    figures = "".join(
        f'<figure><img alt="samples" src="{uri}"><figcaption>step {step:,}</figcaption></figure>'
        for step, uri in grids
    )
    last = len(grids) - 1
    slider = f'<input type=range min=0 max={last} value={last} aria-label="step"><span></span>'
    body = f"<div class=slider>{slider}</div><div class=samples>{figures}</div>"
    return f"<div class=box>{body}</div>" if grids else ""


def _charts(records: Records, starts: Iterable[Mapping[str, Any]]) -> list[str]:
    """The loss, that by noise level, and the other curves; empty where nothing was logged."""
    marks = [
        (start["step"], f"started again at step {start['step']:,}, {start.get('time', '')}")
        for start in starts
        if start["step"] and records and records[0]["step"] <= start["step"] <= records[-1]["step"]
    ]

    def curve(label: str, field: str, colour: str = "c0", *, positive: bool = False, **look: bool) -> Curve:
        return Curve(label, colour, *series(records, field, positive=positive), **look)

    loss = [
        curve("training", "loss", "c0", positive=True, noisy=True),
        curve("held-out", "heldout_loss", "c1", positive=True, dots=True),
    ]
    quarters = [
        curve(f"timesteps {part}", f"loss_q{quarter}", f"c{quarter + 1}", positive=True, noisy=True)
        for quarter, part in enumerate(("0 to ¼", "¼ to ½", "½ to ¾", "¾ to 1"), 1)
    ]
    gradient = [curve("mean of steps", "grad_norm", positive=True, noisy=True)]
    best = [curve("MFU", "mfu"), curve("of the roofline", "roofline_share", "c1")]
    return [
        chart("Loss", loss, logarithmic=True, marks=marks),
        chart("Loss by noise level", quarters, logarithmic=True, marks=marks),
        chart("Images per second", [curve("all devices", "images_per_second", noisy=True)], marks=marks),
        chart("Share of the peak", best, show=percent, marks=marks),
        chart("Time that waits for data", [curve("share", "data_wait")], show=percent, marks=marks),
        chart("Peak memory per device, GiB", [curve("most of any", "peak_memory_gib")], marks=marks),
        chart("Gradient norm", gradient, logarithmic=True, marks=marks),
        chart("Learning rate", [curve("AdamW", "learning_rate")], marks=marks),
    ]


def _config(settings: Mapping[str, Any]) -> str:
    fields, defaults = flattened(settings), _defaults()
    changed = [
        (name, value, defaults.get(name, "–"))
        for name, value in fields.items()
        if defaults and value != defaults.get(name)
    ]
    rows = "".join(
        f"<tr><th>{_text(name)}</th><td>{_text(value)}</td><td class=dim>{_text(default)}</td></tr>"
        for name, value, default in changed
    )
    first = f"<table><tr><th>field<th>here<th>in configs/base.py</tr>{rows}</table>" if changed else ""
    everything = f"<details><summary>all fields</summary>{_table(fields.items())}</details>"
    return f'<div class="box scroll">{first}{everything}</div>'


def _defaults() -> dict[str, Any]:
    """The fields of configs/base.py, which is there wherever the program runs from its repository."""
    try:
        base = importlib.import_module("configs.base")
    except ImportError:
        return {}
    return flattened(base.get_config().to_dict())


def _start(start: Mapping[str, Any]) -> str:
    versions = start.get("versions") or {}
    told = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    rows = {
        "from step": f"{start['step']:,}",
        "time": start.get("time"),
        "command": start.get("command"),
        "devices": start.get("devices"),
        "processes": start.get("processes"),
        "commit": start.get("commit"),
        "versions": f"Python {start.get('python')}, {told}",
    }
    return _table((name, value) for name, value in rows.items() if value)


def _section(title: str, body: str, content: object) -> str:
    """A part of the page, if there is any content."""
    return f"<section><h2>{title}</h2>{body}</section>" if content else ""


def _table(items: Iterable[tuple[str, Any]]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in items)
    return f'<div class="box scroll"><table>{rows}</table></div>' if rows else ""


def _text(value: Any) -> str:
    return html.escape(f"{value:.5g}" if isinstance(value, float) else str(value))


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
