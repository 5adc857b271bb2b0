import json
import logging

import numpy as np
import pytest
from tiny_components import PlainComponents, tiny_settings, write_checkpoint

from dig_jax import ConfigError, Sampler, evaluation
from dig_jax.evaluation import evaluate as report

DIGITS = {
    "data__name": "digits",
    "data__options": {},
    "evaluation__num_images": 40,
    "sampling__batch_size": 10,
    "sampling__steps": 2,
}
LATENTS = {"data__options": {"image_size": 4, "channels": 4, "num_classes": 5, "length": 60}}


def plain_sampler(**changes):
    return Sampler(PlainComponents(tiny_settings(**changes)), {}, step=7)


def write_metrics(workdir, **values):
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 5} | values) + "\n")


def test_the_grid_shows_the_first_images_that_are_scored_a_row_for_each_class(tmp_path, monkeypatch):
    calls = {}

    def record(name, result=None):
        return lambda *args, **options: calls.update({name: (args, options)}) or result

    for name in ("save_grid", "save_small_grid"):
        monkeypatch.setattr(report, name, record(name))
    monkeypatch.setattr(evaluation, "score_digits", record("score_digits", {}))
    sampler = plain_sampler(**DIGITS, sampling__images_per_class=3)
    report.draw_samples(sampler, tmp_path)
    report.score(sampler, tmp_path)
    (path, images), options = calls["save_grid"]
    (small_path, small), small_options = calls["save_small_grid"]
    (scored, labels), _ = calls["score_digits"]
    assert path == tmp_path / "samples.png"
    assert (small_path, small_options) == (tmp_path / "samples" / "7.png", options)
    np.testing.assert_array_equal(small, images)
    assert options == {"columns": 3, "row_labels": tuple("0123456789")}
    np.testing.assert_array_equal(labels, np.tile(np.arange(10), 4))
    rows = scored[:30].reshape(3, 10, 8, 8, 1).swapaxes(0, 1)
    np.testing.assert_array_equal(images, rows.reshape(30, 8, 8, 1))
    assert len(np.unique(images.reshape(30, -1), axis=0)) == 30


def test_scores_are_written_with_what_they_depend_on(tmp_path):
    sampler = plain_sampler(**DIGITS, sampling__ema="0.99", sampling__guidance_scale=2.0)
    scores = report.score(sampler, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert scores["num_images"] == 40
    assert scores["accuracy"] < 0.5  # it is noise that is scored here
    expected = {"step": 7, "ema": "0.99", "sampler": "ddim", "sampling_steps": 2, "guidance_scale": 2.0}
    assert scores | expected == scores
    line = report.summary(scores)
    assert "\n" not in line
    assert f"Fréchet distance {scores['frechet_distance']:.3f}" in line


@pytest.mark.parametrize("changes", [{}, DIGITS | {"evaluation__num_images": 0}], ids=["fake", "none"])
def test_there_is_no_score_without_a_classifier_or_without_images(changes, tmp_path):
    assert report.score(plain_sampler(**changes), tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_too_few_images_for_a_score_are_blamed_on_the_setting(tmp_path):
    with pytest.raises(ConfigError, match=r"config.evaluation.num_images: .* 2 or more images, got 1"):
        report.score(plain_sampler(**DIGITS | {"evaluation__num_images": 1}), tmp_path)


@pytest.mark.parametrize("values", [None, {"loss": None}], ids=["no file", "no loss"])
def test_a_run_without_losses_has_no_curve_and_says_so(values, tmp_path, caplog):
    if values:
        write_metrics(tmp_path, **values)
    with caplog.at_level(logging.WARNING, "dig_jax"):
        report.draw_samples(plain_sampler(), tmp_path)
    assert (tmp_path / "samples.png").exists()
    assert not (tmp_path / "loss.png").exists()
    (message,) = caplog.messages
    assert message.startswith("there is no loss curve: ")
    assert "metrics.jsonl" in message


def test_latents_make_no_picture(tmp_path):
    write_metrics(tmp_path, loss=0.5)
    report.draw_samples(plain_sampler(**LATENTS), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


def test_a_workdir_is_evaluated_anew_even_without_its_metrics(tmp_path):
    settings = tiny_settings(**DIGITS)
    write_checkpoint(tmp_path, settings)
    scores = report.evaluate(settings, tmp_path)
    assert scores["step"] == 7
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        "checkpoints",
        "samples.png",
        "samples",
        "neighbours.png",
        "scores.json",
        "report.html",
    }
    assert "frechet_distance" in (tmp_path / "report.html").read_text()


def test_what_has_no_score_cannot_be_evaluated(tmp_path):
    settings = tiny_settings()
    write_checkpoint(tmp_path, settings)
    with pytest.raises(ConfigError, match=r"it takes config.data.name='digits' .* they are 'fake' and 500"):
        report.evaluate(settings, tmp_path)
