import json
import logging
import re

import pytest
from object_storage import bucket, directed, storage_servers  # noqa: F401 (fixtures)
from PIL import Image

from dig_jax import ConfigError
from dig_jax.evaluation import sweep as sweeps
from dig_jax.evaluation.sweep import best_row, parse_points, save_plot, sweep, table
from dig_jax.files.paths import to_path
from dig_jax.sampling.sampler import Sampler
from dig_jax.testing import PlainComponents, tiny_settings

DIGITS = {
    "data__name": "digits",
    "data__options": {},
    "evaluation__num_images": 20,
    "sampling__batch_size": 20,
    "sampling__steps": 2,
}
TEXTS = ["guidance_scale=1.5,2,3", "steps=2"]


def rows(values, **options):
    return [
        {"options": dict(zip(options, point, strict=True)), "scores": {"fid": fid, "is": 10 - fid}}
        for point, fid in zip(zip(*options.values(), strict=True), values, strict=True)
    ]


def test_all_combinations_are_points():
    points = parse_points(["guidance_interval=0:1,0.2:0.8", "steps=10,20", "ema=params"])
    assert len(points) == 4
    assert points[1] == {"guidance_interval": (0.0, 1.0), "steps": 20, "ema": "params"}


@pytest.mark.parametrize(
    "texts, message",
    [
        (["guidance=1,2"], "unknown option 'guidance'; expected guidance_scale, .*; did you mean 'guidance_"),
        (["steps=1,2.5"], "got '2.5'; expected whole numbers such as 10,20"),
        (["guidance_scale=1,"], "got ''; expected numbers such as 1,1.5"),
        (["guidance_interval=0.5"], "got '0.5'; expected intervals such as 0:1,0.2:0.8"),
        (["sampler="], "got ''; expected names separated by commas"),
        (["steps=1", "steps=2"], "steps is swept twice"),
    ],
)
def test_invalid_sweeps_are_one_line(texts, message):
    with pytest.raises(ConfigError, match=f"invalid --sweep=.*{message}"):
        parse_points(texts)


def test_the_best_point_and_the_table_follow_the_figure():
    points = rows([3.0, 2.0, 4.0], guidance_scale=[1.0, 1.5, 2.0])
    best = best_row(points, "fid", higher_is_better=False)
    assert best["options"] == {"guidance_scale": 1.5}
    assert best_row(points, "is", higher_is_better=True) is best
    lines = table(points, ["fid", "is"], best)
    assert [line.split() for line in lines[1:]] == [
        ["1.0", "3", "7"],
        ["1.5", "2", "8", "best"],
        ["2.0", "4", "6"],
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": [1.0, 1.5, 2.0, 1.0], "steps": [5, 5, 5, 9]},
        {"guidance_interval": [(0.0, 1.0), (0.1, 0.9), (0.2, 0.8), (0.3, 0.7)]},
    ],
    ids=["numbers", "intervals"],
)
def test_the_plot_has_a_panel_for_each_figure(options, tmp_path):
    points = rows([3.0, 2.0, 4.0, 5.0], **options)
    widths = []
    for figures in (["fid"], ["fid", "is"]):
        save_plot(tmp_path / "sweep.png", points, figures, points[1])
        with Image.open(tmp_path / "sweep.png") as image:
            widths.append(image.width)
    assert widths[1] == 2 * widths[0]


@pytest.fixture
def plain_model(monkeypatch):
    """Load an exact denoiser instead of a checkpoint."""

    def load(path, *, settings, mesh):
        return Sampler(PlainComponents(settings), {}, step=7, mesh=mesh)

    monkeypatch.setattr(sweeps, "load", load)


@pytest.mark.usefixtures("plain_model")
def test_a_sweep_scores_every_point_with_the_same_seeds_and_resumes(tmp_path, caplog, monkeypatch):
    draws, counted = [], Sampler.counted

    def recorded(self, labels=None, *, seeds, **options):
        draws.append((self.components.config.sampling.guidance_scale, seeds.tolist()))
        return counted(self, labels, seeds=seeds, **options)

    monkeypatch.setattr(Sampler, "counted", recorded)
    settings = tiny_settings(**DIGITS)
    with caplog.at_level(logging.INFO, "dig_jax"):
        best = sweep(settings, tmp_path, TEXTS)
    assert [drawn for _, drawn in draws] == [list(range(20))] * 3
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert stored["best_by"] == "frechet_distance"
    distances = [row["scores"]["frechet_distance"] for row in stored["points"]]
    assert best["frechet_distance"] == min(distances)
    assert len(set(distances)) == 3
    assert json.loads((tmp_path / "scores.json").read_text()) == best
    assert sum(bool(re.search(r"\d  best$", message)) for message in caplog.messages) == 1
    assert (tmp_path / "sweep.png").exists()
    draws.clear()
    assert sweep(settings, tmp_path, ["guidance_scale=3,5", "steps=2"]) is not None
    assert [scale for scale, _ in draws] == [5.0]  # the other point is known


@pytest.fixture
def drawn(plain_model, monkeypatch):
    """The guidance scales of the points that were scored; a point with 1.25 is interrupted."""
    scales = []

    def scored(sampler, folder, *, resume):
        scale = sampler.components.config.sampling.guidance_scale
        if scale == 1.25:
            raise KeyboardInterrupt
        scales.append(scale)
        return {"frechet_distance": scale, "accuracy": 1.0}

    monkeypatch.setattr(sweeps, "score", scored)
    return scales


def stored_scales(folder):
    points = json.loads((folder / "sweep.json").read_text())["points"]
    return sorted(point["scores"]["frechet_distance"] for point in points)


def test_sweep_json_keeps_the_points_of_earlier_and_interrupted_sweeps(tmp_path, drawn):
    settings = tiny_settings(**DIGITS)
    sweep(settings, tmp_path, ["guidance_scale=1.5,2"])
    with pytest.raises(KeyboardInterrupt):
        sweep(settings, tmp_path, ["guidance_scale=1,1.25,1.5,2"])
    assert stored_scales(tmp_path) == [1, 1.5, 2]
    best = sweep(settings, tmp_path, ["guidance_scale=2,3", "steps=2"])  # the best of these, not of all
    assert best["frechet_distance"] == 2
    assert stored_scales(tmp_path) == sorted(drawn) == [1, 1.5, 2, 3]


def test_sweep_json_in_object_storage_is_continued(bucket, drawn):  # noqa: F811
    folder = to_path(f"{bucket}/run")
    for values in ("1,2", "2,3"):
        sweep(tiny_settings(**DIGITS), folder, [f"guidance_scale={values}"])
    assert stored_scales(folder) == sorted(drawn) == [1, 2, 3]


def test_a_sweep_without_scores_or_with_an_invalid_value_fails_before_it_starts(tmp_path):
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        sweep(tiny_settings(), tmp_path, TEXTS)
    with pytest.raises(ConfigError, match=r"config.sampling.steps=0; expected a positive number"):
        sweep(tiny_settings(**DIGITS), tmp_path, ["steps=10,0"])
