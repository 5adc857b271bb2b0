import html.parser
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dig_jax.checkpoints.description import config_and_versions
from dig_jax.files.jsonl import read_rows
from dig_jax.reporting.html import charts, write_report
from dig_jax.reporting.html.charts import Curve, chart, number
from dig_jax.reporting.html.embedded_grids import embedded_grids
from dig_jax.testing import tiny_settings
from dig_jax.training.telemetry.starts import note_start

LIMIT = 2_000_000
VOID = {"meta", "img", "input", "br"}


class Page(html.parser.HTMLParser):
    """The tags and texts of a page, whose tags must nest, and the URLs that it refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loaded, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.loaded += [
            value for name, value in attributes if name in ("src", "href", "srcset", "data", "xlink:href")
        ]
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(workdir) -> Page:
    write_report(workdir)
    text = (workdir / "report.html").read_text()
    assert len(text.encode()) < LIMIT
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)
    return Page(text)


def write_run(workdir, rows: int) -> None:
    """The files of a run whose loss falls as a power of the step, with noise."""
    random = np.random.default_rng(0)
    lines = [
        {
            "step": index,
            "loss": index**-0.3 * random.uniform(0.8, 1.2),
            "loss_q1": 1.0,
            "grad_norm": random.exponential(),
            "learning_rate": 1e-4,
            "images_per_second": random.normal(1000, 30),
            "data_wait": 0.01,
            "mfu": 0.4,
            "roofline_share": 0.6,
            "peak_memory_gib": 60.0,
            "skipped_steps": index % 2,
        }
        | ({"heldout_loss": index**-0.3} if index % 10 == 0 else {})
        for index in range(1, rows + 1)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "config.json").write_text(json.dumps(config_and_versions(tiny_settings())))
    (workdir / "scores.json").write_text(json.dumps({"accuracy": 0.98, "frechet_distance": 0.43}))
    note_start(workdir, 0)


def write_grid(workdir, step: int, *, side: int = 40, noisy: bool = False) -> None:
    (workdir / "samples").mkdir(exist_ok=True)
    pixels = np.random.default_rng(step).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels if noisy else pixels // 255 * 255).save(workdir / "samples" / f"{step}.png")


@pytest.mark.parametrize("rows", [1, 10, 20_000])
def test_the_report_is_one_small_file_that_loads_nothing(tmp_path, rows):
    write_run(tmp_path, rows)
    for step in (10, 20):
        write_grid(tmp_path, step)
    page = page_of(tmp_path)
    loaded = [url for url in page.loaded if not url.startswith("#")]
    assert len(loaded) == 2 and all(url.startswith("data:image/") for url in loaded)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    text = "".join(page.texts)
    source = re.sub(r'xmlns(:xlink)?="http://www.w3.org/[^"]*"', "", (tmp_path / "report.html").read_text())
    assert not re.search(r"https?://|@import|url\((?!#)", source)
    for section in ("Samples and loss", "Curves", "Loss", "Images per second", "Scores", "Config", "Starts"):
        assert section in text
    assert f"{rows:,} of 20" in text


def test_an_empty_workdir_has_a_report(tmp_path):
    assert "Curves" not in "".join(page_of(tmp_path).texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b'{"step": 3, "loss": null}\n{"step": "x"}\n{"st'),
        ("config.json", b"[1"),
        ("scores.json", b"[]"),
        ("starts.jsonl", b'{"step": 4}\n{"step": null}\n{"time'),
        ("samples/3.png", b"no picture"),
        ("samples/best.png", b""),
    ],
)
def test_damaged_files_are_skipped(tmp_path, name, content):
    (tmp_path / "samples").mkdir()
    (tmp_path / name).write_bytes(content)
    page_of(tmp_path)


def test_a_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    write_report(tmp_path)
    old = (tmp_path / "report.html").read_bytes()

    def fail(source, target):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", fail)
    (tmp_path / "scores.json").write_text('{"accuracy": 0.98}')
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "scores.json"}


def test_text_from_files_is_escaped(tmp_path):
    evil = """</script><script>alert(1)</script>&<b>" onload="alert(1)"'"""
    config = config_and_versions(tiny_settings())
    config["config"]["init_from"] = evil
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_run_of_two_starts(tmp_path, command=evil, time=evil)
    (tmp_path / "scores.json").write_text(json.dumps({evil: evil}))
    page = page_of(tmp_path)
    assert "".join(page.texts).count("alert(1)") >= 5
    assert "<script>alert" not in (tmp_path / "report.html").read_text()
    assert not any("onload" in attributes for _, attributes in page.tags)


def test_names_that_are_not_utf_8_are_shown_with_a_question_mark(tmp_path):
    write_run_of_two_starts(tmp_path, command="python main.py --config=d\udce9ta")
    assert "--config=d?ta" in "".join(page_of(tmp_path).texts)


def write_run_of_two_starts(workdir, **fields) -> None:
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [{"step": step} | fields for step in (0, 2)]
    (workdir / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))


def test_a_resumed_run_is_marked_at_the_step_it_resumed_from(tmp_path):
    write_run_of_two_starts(tmp_path, time="Monday")
    page = page_of(tmp_path)
    (mark,) = [attributes for _, attributes in page.tags if attributes.get("class") == "mark"]
    assert mark["title"] == "resumed from step 2, Monday"
    # A third of the way from step 1 to step 4.
    left, right = 100 * charts._LEFT, 100 * charts._RIGHT
    assert float(mark["style"].removeprefix("left: ").removesuffix("%")) == pytest.approx(
        left + (right - left) / 3
    )


def test_starts_record_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--config=configs/digits.py"])
    note_start(tmp_path, 0)
    note_start(tmp_path, 500)
    first, second = read_rows(tmp_path / "starts.jsonl")
    assert (first["step"], second["step"]) == (0, 500)
    assert first["devices"] == "4 × cpu" and first["versions"]["jax"]
    assert first["command"] == "python main.py --config=configs/digits.py"


def test_the_config_shows_first_what_differs_from_the_defaults(tmp_path):
    write_run(tmp_path, 1)
    text = (write_report(tmp_path), (tmp_path / "report.html").read_text())[1]
    changed, everything = text.split("<summary>all fields</summary>")
    assert "training.steps" in changed and "optimizer.b1" not in changed
    assert "training.steps" in everything and "optimizer.b1" in everything


# Samples.


def test_grids_are_in_order_of_steps_without_unreadable_ones(tmp_path):
    for step in (1000, 20, 300):
        write_grid(tmp_path, step)
    (tmp_path / "samples" / "400.png").write_bytes(b"\x89PNG")
    assert [step for step, _ in embedded_grids(tmp_path)] == [20, 300, 1000]


def test_many_large_grids_are_thinned_evenly(tmp_path):
    for step in range(1, 61):
        write_grid(tmp_path, step, side=200, noisy=True)
    grids = embedded_grids(tmp_path)
    steps = [step for step, _ in grids]
    assert steps[0] == 1 and steps[-1] == 60 and 5 < len(steps) < 60
    assert max(np.diff(steps)) - min(np.diff(steps)) <= 3
    assert sum(len(uri) for _, uri in grids) < 1_200_000
    assert all(uri.startswith("data:image/jpeg") for _, uri in grids)


def test_drawings_with_few_colors_stay_png(tmp_path):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (100, 100)).save(tmp_path / "samples" / "1.png")
    ((_, uri),) = embedded_grids(tmp_path)
    assert uri.startswith("data:image/png")


# Axes and curves.


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(
    "values", [[0.05], [0.05, 0.06], [0.04, 0.21], [0.3, 40.0], [1e-3, 1e3], [1e-12, 1e12]], ids=str
)
def test_an_axis_has_several_ticks_with_different_labels(values, logarithmic):
    curve = Curve("", "c0", np.arange(1.0, 1 + len(values)), np.array(values))
    drawn = chart("Title", [curve], logarithmic=logarithmic)
    texts = re.findall(r"text-anchor: (end|middle)[^>]*>([^<]*)", drawn.svg)
    for axis in ("end", "middle"):
        labels = [text for anchor, text in texts if anchor == axis]
        assert 2 <= len(labels) <= 9
        assert len(set(labels)) == len(labels)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=2000), st.booleans())
def test_a_thinned_curve_keeps_its_end_and_its_extremes(numbers, noisy):
    steps = np.arange(1.0, len(numbers) + 1)
    ends, means, low, high = charts._thin(Curve("", "c0", steps, np.array(numbers), noisy=noisy))
    assert len(ends) == len(means) <= 240 and ends[-1] == steps[-1] and (np.diff(ends) > 0).all()
    assert low.min() == min(numbers) and high.max() == max(numbers)
    if len(numbers) <= 240 and not noisy:
        np.testing.assert_allclose(means, numbers)


def test_a_chart_has_the_numbers_that_it_draws():
    steps = np.array([1.0, 2.0, 3.0])
    curves = [Curve("a", "c0", steps, np.array([0.1, 0.2, 0.3])), Curve("b", "c1", steps[:0], steps[:0])]
    drawn = chart("Title", curves, show=charts.percent)
    assert drawn.hover["curves"] == [[[1, 2, 3], ["10 %", "20 %", "30 %"]]]
    assert drawn.legend == [("a", "c0", "30 %")]
    assert "var(--c0)" in drawn.svg
    assert chart("Title", curves[1:]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0412345, "0.0412"), (1e-6, "1e-6"), (999, "999"), (4321, "4321"), (12345, "12.3k")]
    + [(400_000, "400k"), (2_500_000, "2.5M"), (-3, "-3"), (1e10, "10G")],
)
def test_numbers_are_short(value, text):
    assert number(float(value)) == text
