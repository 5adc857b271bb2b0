import dataclasses
import json
import logging

import numpy as np
import pytest

from dig_jax import ConfigError, Sampler
from dig_jax.config import EvaluationConfig
from dig_jax.errors import UserError
from dig_jax.evaluation import digits, evaluate, registry
from dig_jax.evaluation.evaluate import draw_neighbors, score
from dig_jax.evaluation.evaluator import Accumulator, Evaluator
from dig_jax.evaluation.sweep import sweep
from dig_jax.files.lock import LOCK_FILE, writer_lock
from dig_jax.reporting import sample_grids
from dig_jax.reporting.sample_grids import draw_samples
from dig_jax.testing import PlainComponents, tiny_settings, write_checkpoint
from dig_jax.training.train import train

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


def test_the_grid_shows_the_first_scored_images_one_row_per_class(tmp_path, monkeypatch):
    calls = {}

    def record(name, result=None):
        return lambda *args, **options: calls.update({name: (args, options)}) or result

    for name in ("save_grid", "save_small_grid"):
        monkeypatch.setattr(sample_grids, name, record(name))
    scores = {"frechet_distance": 1, "frechet_distance_real": 1, "accuracy": 1, "num_images": 40}
    scores |= {"classifier_heldout_accuracy": 1}
    monkeypatch.setattr(digits, "score_digits", record("score_digits", scores))
    sampler = plain_sampler(**DIGITS, sampling__images_per_class=3)
    draw_samples(sampler, tmp_path)
    score(sampler, tmp_path)
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


def test_scores_are_written_with_what_they_depend_on(tmp_path, caplog):
    given = {"guidance_scale": 2.0, "guidance_rescale": 0.7, "guidance_channels": 1, "ema": "0.99"}
    sampler = plain_sampler(**DIGITS, **{f"sampling__{name}": value for name, value in given.items()})
    with caplog.at_level(logging.INFO, "dig_jax"):
        scores = score(sampler, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert scores["num_images"] == 40
    assert scores["accuracy"] < 0.5  # it is noise that is scored here
    expected = given | {
        "step": 7,
        "sampler": "ddim",
        "sampling_steps": 2,
        "time_shift": 1.0,
        "weak_model": "",
    }
    assert scores | expected == scores
    *progress, line = caplog.messages
    assert "image 40/40" in progress[-1]
    assert "\n" not in line
    assert f"Fréchet distance {scores['frechet_distance']:.3f}" in line


@pytest.fixture
def only_digits(monkeypatch):
    for name in set(registry.EVALUATORS) - {"digits"}:
        monkeypatch.delitem(registry.EVALUATORS, name)


@pytest.mark.parametrize("changes", [{}, DIGITS | {"evaluation__num_images": 0}], ids=["fake", "none"])
def test_nothing_is_scored_without_an_evaluator_or_without_images(changes, tmp_path, only_digits):
    sampler = plain_sampler(**changes)
    assert score(sampler, tmp_path) == {}
    draw_neighbors(sampler, tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_few_images_for_a_score_name_the_setting(tmp_path):
    message = r"config.evaluation.num_images: too few images to score: got 1; expected at least 2"
    with pytest.raises(ConfigError, match=message):
        score(plain_sampler(**DIGITS | {"evaluation__num_images": 1}), tmp_path)


@pytest.mark.parametrize("values", [None, {"loss": None}], ids=["no file", "no loss"])
def test_a_run_without_losses_has_no_curve_and_a_warning(values, tmp_path, caplog):
    if values:
        write_metrics(tmp_path, **values)
    with caplog.at_level(logging.WARNING, "dig_jax"):
        draw_samples(plain_sampler(), tmp_path)
    assert (tmp_path / "samples.png").exists()
    assert not (tmp_path / "loss.png").exists()
    (message,) = caplog.messages
    assert message.startswith(f"could not write {tmp_path}")
    assert "metrics.jsonl" in message


def test_latents_without_an_autoencoder_have_no_grid(tmp_path):
    write_metrics(tmp_path, loss=0.5)
    draw_samples(plain_sampler(**LATENTS), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


def test_a_checkpoint_without_metrics_is_evaluated(tmp_path):
    settings = tiny_settings(**DIGITS)
    write_checkpoint(tmp_path, settings)
    scores = evaluate.evaluate(settings, tmp_path)
    assert scores["step"] == 7
    written = {path.name for path in tmp_path.iterdir()}
    files = {"checkpoints", "samples.png", "samples", "neighbors.png", "scores.json", "report.html"}
    assert written == files
    assert "frechet_distance" in (tmp_path / "report.html").read_text()


def test_one_evaluation_at_a_time_writes_to_a_directory_also_while_its_run_trains(tmp_path):
    settings, message = tiny_settings(**DIGITS), f"the folder of scores {tmp_path} is in use by process"
    write_checkpoint(tmp_path, settings)
    np.savez(tmp_path / "fake.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    of_images = dataclasses.replace(settings, evaluation=EvaluationConfig(scores="kid"))
    with writer_lock(tmp_path / LOCK_FILE, tmp_path), evaluate.writing_scores(tmp_path):
        for call in (
            lambda: evaluate.evaluate(settings, tmp_path),
            lambda: sweep(settings, tmp_path, ["steps=2"]),
            lambda: evaluate.evaluate_images(of_images, tmp_path / "fake.npz", tmp_path, tmp_path),
        ):
            with pytest.raises(UserError, match=message):
                call()
        assert not (tmp_path / "scores.json").exists()


def test_scores_of_images_do_not_replace_those_of_a_run(tmp_path):
    settings = tiny_settings(evaluation__scores="kid")
    write_checkpoint(tmp_path, settings)
    np.savez(tmp_path / "fake.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    with pytest.raises(
        ConfigError, match="missing --output: --images would overwrite the scores of the run in "
    ):
        evaluate.evaluate_images(settings, tmp_path / "fake.npz", tmp_path)


def test_data_without_an_evaluator_cannot_be_evaluated(tmp_path, only_digits):
    settings = tiny_settings()
    write_checkpoint(tmp_path, settings)
    message = r"got config.data.name='fake' .*num_images=500; expected data with an evaluator \(digits\)"
    with pytest.raises(ConfigError, match=message):
        evaluate.evaluate(settings, tmp_path)


class Brightness(Evaluator):
    """A second evaluator, of data that the first does not apply to."""

    def applies_to(self, settings):
        return settings.data.name == "fake"

    def rankings(self, settings):
        return {"brightness": True}

    def check(self, components):
        pass

    def start(self, task):
        return MeanBrightness(task)

    def summary(self, scores):
        return f"brightness {scores['brightness']:.1f}"


class MeanBrightness(Accumulator):
    def __init__(self, task):
        self.source, self.means = task.components.train_source, []

    def add(self, indices, images):
        self.means.extend(images.mean((1, 2, 3)))

    def scores(self):
        real = np.mean([self.source[index]["image"].mean() for index in range(9)])
        return {"brightness": float(np.mean(self.means) - real)}


def test_training_and_evaluation_use_a_second_evaluator(tmp_path, monkeypatch, caplog):
    """A run of 0 steps compiles no train step; it scores the initial parameters."""
    monkeypatch.setitem(registry.EVALUATORS, "brightness", Brightness())
    settings = tiny_settings(evaluation__num_images=4, training__steps=0, model__name="DiT-S/2")
    write_checkpoint(tmp_path / "evaluated", settings)
    for command, workdir in ((train, tmp_path / "trained"), (evaluate.evaluate, tmp_path / "evaluated")):
        with caplog.at_level(logging.INFO, "dig_jax"):
            scores = command(settings, workdir)
        assert 0 < abs(scores["brightness"]) < 255
        assert f"brightness {scores['brightness']:.1f}" in caplog.messages
        assert not (workdir / "neighbors.png").exists()
        caplog.clear()


def test_a_file_as_workdir_is_an_error_before_anything_is_drawn(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    with pytest.raises(
        ConfigError, match=f"missing --output: --workdir={path} is a file; expected --output=DIR"
    ):
        evaluate.evaluate(tiny_settings(), path)
