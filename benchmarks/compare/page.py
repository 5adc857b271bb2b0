"""Tables and figures of docs/benchmarks/compare.md, from the record."""

import collections
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.compare import peers_page
from benchmarks.compare.cases import MODELS, SIZES
from benchmarks.compare.record import Record
from dig_jax.hardware.chips import CHIPS, Chip

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "benchmarks" / "compare.md"
IMAGES = ROOT / "docs" / "images"
BEGIN, END = "<!-- tables -->\n", "<!-- end of tables -->\n"
BEGIN_CPU, END_CPU = "<!-- CPU -->\n", "<!-- end of CPU -->\n"
PHASES = {"train": "train step", "sample": "guided sampling step", "meanflow": "train step of MeanFlow"}
_ATTENTION = {"DiT": "DiT, flash attention", "DiT, plain": "DiT, plain attention"}
_LINE = 3  # a panel has points of at least this many resolutions
# Chips of the table of ratios → those whose programs stand in for missing ones, the most similar first.
_SIMILAR = {"v5e": ("v6e",), "v6e": (), "tpu7x": ("v6e",), "h100": ("h200", "v6e"), "h200": ("v6e",)}
Row = Mapping[str, Any]


def describe(row: Row) -> str:
    """Return a row in words."""
    if "error" in row:
        return row["error"]
    memory = f"{row['bytes'] / 2**30:.2f} GiB"
    if "milliseconds" in row:
        times = ", ".join(f"{name} {t:.2f}" for name, t in row["milliseconds"].items())
        return f"{memory}, at best {row['images_per_second']:.4g} images/s ({times} ms)"
    if "step_milliseconds" in row:
        return f"{memory}, {row['images_per_second']:.4g} images/s"
    return f"{memory}: too much"


def write(record: Record, cpu_rows: Sequence[Row]) -> None:
    """Replace the tables of the page, and draw its figures."""
    rows = [row for row in record.rows.values() if "error" not in row]
    text = _replaced(PAGE.read_text(), BEGIN, [*_ratios(rows), *_tables(rows)], END)
    PAGE.write_text(_replaced(text, BEGIN_CPU, peers_page.tables(cpu_rows), END_CPU))
    for quantity in ("memory", "time"):
        if panels := _panels(rows, "size", "pixels"):
            _figure(panels, quantity, "pixels").savefig(IMAGES / f"compare_{quantity}.png", dpi=130)
        if panels := _panels(rows, "pixels", "size"):
            _figure(panels, quantity, "size").savefig(IMAGES / f"compare_{quantity}_by_size.png", dpi=130)


def _replaced(text: str, begin: str, lines: Iterable[str], end: str) -> str:
    """Return the text with other lines between two marks."""
    before, _, rest = text.partition(begin)
    return before + begin + "\n".join(lines) + "\n" + end + rest.partition(end)[2]


def _ratios(rows: Sequence[Row]) -> Iterator[str]:
    """Compare DiG-XL with the faster attention of DiT-XL on all chips."""
    timed = [row for row in rows if row["size"] == "XL" and "traffic" in row]
    pixels = sorted({row["pixels"] for row in timed})
    yield "**Speed of DiG-XL/2 / speed of DiT-XL/2 with its faster attention, computed**\n"
    yield f"| step | chip | {' | '.join(f'{number:,} px' for number in pixels)} |"
    yield "|" + "---|" * (2 + len(pixels))
    for phase, chip in itertools.product(PHASES, _SIMILAR):
        cells = [_ratio(timed, phase, number, chip) for number in pixels]
        if any(cells):
            yield f"| {PHASES[phase]} | {chip} | {' | '.join(cells)} |"
    yield "\n*Programs for the chip itself; a star: for the most similar chip, at the rates of this one.*\n"


def _ratio(rows: Sequence[Row], phase: str, pixels: int, chip: str) -> str:
    """Return a ratio from the programs for a chip, or else for the most similar one that has both models."""
    for device in (chip, *_SIMILAR[chip]):
        seconds = {
            row["model"]: _seconds(row, CHIPS[chip])
            for row in rows
            if (row["device"], row["phase"], row["pixels"]) == (device, phase, pixels)
        }
        dit = [seconds[model] for model in ("DiT", "DiT, plain") if model in seconds]
        if dit and "DiG" in seconds:
            return f"{min(dit) / seconds['DiG']:.2f}{'' if device == chip else '*'}"
    return ""


def _seconds(row: Row, chip: Chip) -> float:
    """Return the roofline time of a row's step at a chip's rates in bfloat16."""
    return max(row["flops"] / chip.flops["bfloat16"], row["traffic"] / chip.bandwidth)


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a section for each device, with a table for each size and phase."""
    sections = collections.defaultdict(list)
    for row in rows:
        sections[row["kind"], row["device"]].append(row)
    chips = [*_SIMILAR]
    for kind, device in sorted(sections, key=lambda x: chips.index(x[1]) if x[1] in chips else -1):
        found = sections[kind, device]
        yield f"### One {device}, {kind}\n"
        for size, phase in itertools.product(SIZES, PHASES):
            group = [row for row in found if (row["size"], row["phase"]) == (size, phase)]
            yield from _table(f"{PHASES[phase][0].upper()}{PHASES[phase][1:]}, size {size}", group)
        versions = {f"{name} {version}" for row in found for name, version in row["versions"].items()}
        dates = sorted({row["date"] for row in found})
        yield f"*{', '.join(sorted(versions))}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}.*\n"


def _table(title: str, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of models by resolution, or nothing without rows."""
    if not rows:
        return
    pixels = sorted({row["pixels"] for row in rows})
    yield f"**{title}**\n"
    yield f"| model | {' | '.join(f'{number:,} px' for number in pixels)} |"
    yield "|" + "---|" * (1 + len(pixels))
    found = {(row["model"], row["pixels"]): row for row in rows}
    for model in MODELS:
        cells = [_cell(found.get((model, number))) for number in pixels]
        if any(cells):
            yield f"| {_ATTENTION.get(model, model)} | {' | '.join(cells)} |"
    yield ""


def _cell(row: Row | None) -> str:
    """Return milliseconds per image, what bounds them, and GiB."""
    if row is None:
        return ""
    memory = f"{row['bytes'] / 2**30:.2f} GiB"
    if "images_per_second" not in row:
        return f"does not fit: {memory}"
    bound = f" ({row['bound']})" if "bound" in row else ""
    milliseconds = 1e3 / row["images_per_second"]
    time = f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"
    return f"{time} ms{bound}, {memory}"


def _panels(rows: Sequence[Row], fixed: str, varied: str) -> dict[tuple[Any, str], list[Row]]:
    """Return the v6e's rows of each size or resolution and phase that has enough of the other for a line."""
    panels = collections.defaultdict(list)
    for row in rows:
        if row["device"] == "v6e":
            panels[row[fixed], row["phase"]].append(row)
    return {
        panel: panels[panel]
        for panel in sorted(panels, reverse=True)
        if len({row[varied] for row in panels[panel]}) >= _LINE
    }


def _figure(panels: Mapping[tuple[Any, str], Sequence[Row]], quantity: str, varied: str) -> Figure:
    """Draw memory or time against the resolution ("pixels") or the parameters ("size")."""
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2 + 4 * columns, 1 + 3 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    used = axes.flat[: len(panels)]
    for ((fixed, phase), rows), axis in zip(panels.items(), used, strict=True):
        _panel(axis, rows, quantity, varied)
        fixed = f"size {fixed}" if varied == "pixels" else f"{fixed:,} px"
        axis.set_title(f"{PHASES[phase]}, {fixed}", fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("GiB of memory" if quantity == "memory" else "ms for 2,048² pixels, roofline")
    handles = {line.get_label(): line for axis in used for line in axis.lines}
    figure.legend(
        handles.values(), handles.keys(), fontsize=9, loc="outside lower center", ncols=len(handles)
    )
    figure.suptitle("One TPU v6e, computed from compiled programs", fontsize=11)
    return figure


def _panel(axis: Axes, rows: Sequence[Row], quantity: str, varied: str) -> None:
    x = "pixels" if varied == "pixels" else "parameters"

    def value(row: Row) -> float:
        if quantity == "memory":
            return row["bytes"] / 2**30
        return 1e3 / row["images_per_second"] * (2048 / row["pixels"]) ** 2

    for number, model in enumerate(MODELS):
        points = sorted(
            (row[x], value(row))
            for row in rows
            if row["model"] == model and (quantity == "memory" or "images_per_second" in row)
        )
        if points:
            name = _ATTENTION.get(model, model)
            axis.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=name)
    if quantity == "memory":
        axis.axhline(rows[0]["limit"] / 2**30, color="gray", linestyle=":", label="memory of the chip")
    # Models of a size have nearly the same parameters: one tick for them.
    ticks = sorted({row[varied]: row[x] for row in rows}.values())
    ticks = [tick for tick, after in itertools.pairwise([*ticks, 2 * ticks[-1]]) if after > 1.2 * tick]
    if varied == "pixels":
        labels, name = [f"{tick:,}" for tick in ticks], "pixels along a side"
    else:
        labels, name = [f"{tick / 1e6:.0f}" for tick in ticks], "parameters, millions"
    axis.set(xscale="log", yscale="log", xlabel=name)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.set_xticks(ticks, labels, fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
