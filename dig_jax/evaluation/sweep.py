"""--mode=evaluate --sweep=NAME=VALUES: scores of one model for several sampling options.

All points draw images from the same seeds and labels, so that differences are not those of random images. A
table and sweep.png show the points; sweep.json keeps them, and the same command scores only the missing ones.
"""

import itertools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dig_jax.config import Config, from_dict, to_dict
from dig_jax.errors import ConfigError, InvalidFile, alternatives, naming_setting, suggest
from dig_jax.evaluation.evaluate import nothing_to_evaluate, results_folder, score, writing_scores
from dig_jax.evaluation.evaluator import Scores
from dig_jax.evaluation.generated import GeneratedImages
from dig_jax.evaluation.registry import rankings
from dig_jax.files.atomic import replacing, write_json
from dig_jax.files.json_file import read_json
from dig_jax.files.paths import Path
from dig_jax.parallel import local_mesh, on_process_0
from dig_jax.reporting.pictures import warning_of_failure
from dig_jax.sampling.sampler import Sampler, load

log = logging.getLogger(__name__)

# Fields of `sampling` that can be swept, and how a value is written.
_KINDS = {
    "guidance_scale": float,
    "internal_guidance_scale": float,
    "guidance_interval": tuple,
    "guidance_rescale": float,
    "steps": int,
    "sampler": str,
    "ema": str,
}
Point = dict[str, Any]


def sweep(settings: Config, workdir: Path, texts: Sequence[str], output: Path | None = None) -> Scores:
    """Score all combinations of sampling options; write sweep.json, sweep.png, and scores.json of the best.

    The best point has the best value of `checkpoint.keep_best_by` if it is a score, or of the first score.

    Args:
        settings: the options that are not swept, and the scores.
        workdir: as in `evaluate`.
        texts: "NAME=VALUE,VALUE", such as "guidance_scale=1,1.5,2" or "guidance_interval=0:1,0.2:0.8".
        output: as in `evaluate`.

    Returns:
        The scores of the best point.

    Raises:
        UserError: invalid options, or as in `evaluate`.
    """
    points = parse_points(texts)
    figures = rankings(settings)
    if not figures:
        raise nothing_to_evaluate(settings)
    by = settings.checkpoint.keep_best_by
    by = by if by in figures else next(iter(figures))
    samplers = _samplers(workdir, [_with(settings, point) for point in points])
    output = results_folder(workdir, output)
    rows: list[Point] = []
    with writing_scores(output) as folder:
        known = on_process_0(lambda: _read(folder / "sweep.json"))
        for number, (point, sampler) in enumerate(zip(points, samplers, strict=True), 1):
            identity = _identity(sampler)
            found = next((row for row in known if row.get("identity") == identity), None)
            done = ", already scored" if found else ""
            log.info("point %d of %d: %s%s", number, len(points), _text(point), done)
            scores = found["scores"] if found else score(sampler, folder, resume=output)
            # The same point may have been swept by other options.
            rows.append({"options": point, "identity": identity, "scores": scores})
            scored = [row["identity"] for row in rows]
            others = [row for row in known if row.get("identity") not in scored]
            write_json(folder / "sweep.json", {"best_by": by, "points": rows + others})
        best = best_row(rows, by, higher_is_better=figures[by])
        for line in table(rows, list(figures), best):
            log.info(line)
        write_json(folder / "scores.json", best["scores"])
        with warning_of_failure(folder / "sweep.png"):
            save_plot(folder / "sweep.png", rows, list(figures), best)
    return best["scores"]


def _samplers(workdir: Path, configs: Sequence[Config]) -> list[Sampler]:
    """Return a sampler for each config; those of one average share the parameters.

    Raises:
        UserError: there is no checkpoint, or an option is invalid.
    """
    models: dict[str, Sampler] = {}
    samplers = []
    for config in configs:
        model = models.get(config.sampled_ema) or load(workdir, settings=config, mesh=local_mesh())
        models[config.sampled_ema] = model
        components = model.components.with_config(config)
        samplers.append(Sampler(components, model.params, step=model.step, mesh=local_mesh()))
        with naming_setting("--sweep"):
            _ = samplers[-1].evaluations  # validates the options of all points before the first is scored
    return samplers


def parse_points(texts: Sequence[str]) -> list[Point]:
    """Return all combinations of the values of "NAME=VALUE,VALUE" texts.

    Raises:
        ConfigError: an unknown or repeated name, or an invalid value.
    """
    values: dict[str, list[Any]] = {}
    for text in texts:
        name, _, items = text.partition("=")
        if name not in _KINDS:
            raise ConfigError(
                f"invalid --sweep={text!r}: unknown option {name!r}; expected {alternatives(list(_KINDS))}"
                f"{suggest(name, _KINDS)}"
            )
        if name in values:
            raise ConfigError(f"invalid --sweep={text!r}: {name} is swept twice; expected each option once")
        values[name] = [_value(name, item.strip(), text) for item in items.split(",")]
    return [
        dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())
    ]


def _value(name: str, item: str, text: str) -> Any:
    kind = _KINDS[name]
    try:
        if kind is tuple:
            low, high = item.split(":")
            return float(low), float(high)
        if not item:
            raise ValueError
        return kind(item)
    except ValueError as error:
        expected = {
            float: "numbers such as 1,1.5",
            int: "whole numbers such as 10,20",
            tuple: "intervals such as 0:1,0.2:0.8",
            str: "names separated by commas",
        }
        raise ConfigError(f"invalid --sweep={text!r}: got {item!r}; expected {expected[kind]}") from error


def _with(settings: Config, point: Point) -> Config:
    fields = to_dict(settings)
    fields["sampling"] |= point
    with naming_setting("--sweep"):
        return from_dict(fields)


def _identity(sampler: Sampler) -> dict[str, Any]:
    """Return what the scores of a point depend on."""
    evaluation = sampler.components.config.evaluation
    images = GeneratedImages(sampler, evaluation.num_images)
    irrelevant = ("every_steps", "num_images", "labels")
    named = {key: value for key, value in to_dict(evaluation).items() if key not in irrelevant}
    return {"images": images.fingerprint, **named}


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Return the points of sweep.json; none if it does not exist or holds something else."""
    try:
        points = read_json(path)["points"]
    except (OSError, InvalidFile, KeyError):
        return []
    return [row for row in points if isinstance(row, dict)] if isinstance(points, list) else []


def best_row(rows: Sequence[Mapping[str, Any]], by: str, *, higher_is_better: bool) -> Mapping[str, Any]:
    """Return the row with the best value of a figure."""
    choose = max if higher_is_better else min
    return choose(rows, key=lambda row: row["scores"][by])


def table(rows: Sequence[Mapping[str, Any]], figures: Sequence[str], best: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table of options and figures, with "best" beside the best row."""
    names = list(rows[0]["options"])
    cells = [[*names, *figures]]
    for row in rows:
        options = [_item(row["options"][name]) for name in names]
        cells.append([*options, *(f"{row['scores'][figure]:.5g}" for figure in figures)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    marks = ["", *("  best" if row is best else "" for row in rows)]
    return [line + mark for line, mark in zip(lines, marks, strict=True)]


def save_plot(
    path: pathlib.Path,
    rows: Sequence[Mapping[str, Any]],
    figures: Sequence[str],
    best: Mapping[str, Any],
) -> None:
    """Draw one panel per figure over the option with the most values, one line per value of the others."""
    from matplotlib.figure import Figure  # importing Matplotlib is slow

    names = list(rows[0]["options"])
    along = max(names, key=lambda name: len({_item(row["options"][name]) for row in rows}))
    is_numeric = _KINDS[along] in (float, int)

    def position(row: Mapping[str, Any]) -> Any:
        value = row["options"][along]
        return value if is_numeric else _item(value)

    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        others = {name: value for name, value in row["options"].items() if name != along}
        lines.setdefault(_text(others), []).append(row)
    columns = min(len(figures), 3)
    height = -(-len(figures) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * height), dpi=150, layout="constrained")
    for number, name in enumerate(figures, 1):
        axes = figure.add_subplot(height, columns, number, xlabel=along, ylabel=name)
        for label, points in lines.items():
            points = sorted(points, key=position) if is_numeric else points
            xs, ys = [position(row) for row in points], [row["scores"][name] for row in points]
            axes.plot(xs, ys, "o-", markersize=4, linewidth=1.4, label=label or None)
        axes.plot(
            [position(best)], [best["scores"][name]], "o", markersize=11, fillstyle="none", color="black"
        )
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 1 and any(lines):
            axes.legend(frameon=False, fontsize=7)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _text(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_item(value)}" for name, value in point.items())


def _item(value: Any) -> str:
    return ":".join(f"{x:g}" for x in value) if isinstance(value, (tuple, list)) else f"{value}"
