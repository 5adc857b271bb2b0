"""The table of published scores: current, and every row with settings that this code accepts."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from configs import published
from dig_jax.config import from_dict
from dig_jax.evaluation.scores import SCORES

REPRODUCIBLE = [row for row in published.ROWS if row.config]


def test_the_page_of_published_scores_is_current():
    assert Path("docs/benchmarks/published.md").read_text() == published.markdown(), (
        "run: python -m configs.published > docs/benchmarks/published.md"
    )


def test_the_readme_shows_the_rows_that_commands_reproduce():
    assert published.summary() in Path("README.md").read_text(), (
        "replace the README's table by published.summary()"
    )
    assert published.summary().count("\n") == 2 + len(REPRODUCIBLE)


@pytest.mark.parametrize("row", REPRODUCIBLE, ids=lambda row: f"{row.model}-{row.pixels}-{row.fid}")
def test_the_settings_of_a_row_are_a_valid_config_of_its_model(row):
    name, _, arguments = row.config.partition(":")
    settings = runpy.run_path(f"configs/{name}")["get_config"](*arguments.split(","))
    settings.diffusion.process = "flow" if row.model.startswith("SiT") else "ddpm"
    settings.update_from_flattened_dict(row.evaluation())
    config = from_dict(settings.to_dict())
    assert config.model.name == row.model.replace("SiT", "DiT")
    assert config.data.options["image_size"] * 8 == row.pixels
    sampler = {"ddpm": "DDPM, {} steps", "euler_maruyama": "SDE, {} steps", "dopri5": "ODE, dopri5"}
    assert sampler[config.sampling.sampler].format(config.sampling.steps) == row.sampler
    assert row.guidance in (None, config.sampling.guidance_scale)
    assert set(config.evaluation.score_names) <= set(SCORES)
    assert row.weights or config.training.steps == row.steps


def test_rows_without_a_run_say_so(monkeypatch):
    rows = [row for row in published.ROWS if row.measured_fid is None]
    rows += [dataclasses.replace(row, measured_fid=12.5) for row in rows]
    monkeypatch.setattr(published, "ROWS", rows)
    table = [line for line in published.markdown().splitlines() if re.match(r"\| \w+-\w+/2 ", line)]
    for row, line in zip(rows, table, strict=True):
        assert line.startswith(f"| {row.model} | {row.pixels} |")
        assert line.endswith("| not run |" if row.measured_fid is None else "| 12.5 |")


def test_a_row_that_this_code_cannot_reproduce_has_no_commands():
    without = {(row.model, row.pixels) for row in published.ROWS if not row.commands()}
    assert without == {("SiT-XL/2", 512)}
