"""Scores by features, from the command to scores.json, with a small network in place of Inception."""

import json
import logging
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from ended_runs import GLOO, free_port
from fake_features import random_images, use_fake_networks
from object_storage import bucket, directed, storage_servers  # noqa: F401 (fixtures)

from dig_jax import ConfigError, Sampler, UserError
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.evaluation import evaluate, feature_scores
from dig_jax.evaluation.evaluate import evaluate_images, score
from dig_jax.evaluation.generated import GeneratedImages
from dig_jax.files.local_folder import LocalFolder
from dig_jax.files.paths import children, to_path
from dig_jax.sampling.sampler import to_pixels
from dig_jax.testing import PixelComponents, PlainComponents, tiny_settings, write_checkpoint
from dig_jax.training import train as training
from dig_jax.training.run import Run
from dig_jax.training.train import train

OPTIONS = {"image_size": 8, "channels": 3, "num_classes": 5, "length": 60}
FEW = {
    "data__options": OPTIONS,
    "evaluation__num_images": 30,
    "evaluation__scores": "fid,is_torch_fidelity,precision_recall,kid,mind",
    "sampling__batch_size": 10,
    "sampling__steps": 2,
    "model__name": "DiT-S/2",
}
FIGURES = {"fid", "is_torch_fidelity", "precision", "recall", "kid", "mind"}


@pytest.fixture(autouse=True)
def fake_networks(monkeypatch):
    use_fake_networks(monkeypatch)


def plain_sampler(**changes):
    return Sampler(PlainComponents(tiny_settings(**FEW | changes)), {}, step=7)


def assert_same_figures(a, b):
    for name in FIGURES:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, err_msg=name)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_fake_networks(patch)
        return score(plain_sampler(), tmp_path_factory.mktemp("scored"))


def test_scores_are_stored_with_everything_they_depend_on(scored):
    assert scored.keys() >= FIGURES
    assert scored["num_images"] == 30
    expected = {
        "step": 7,
        "ema": "0.9",
        "sampler": "ddim",
        "sampling_steps": 2,
        "guidance_scale": 1.5,
        "guidance_interval": [0.0, 1.0],
        "seeds": "0…29",
        "labels": "seed modulo the number of classes",
        "dtype": "float32",
        "uint8": "round",
        "autoencoder_hash": "",
    }
    assert scored | expected == scored
    assert scored["networks"] == {
        "inception": {"weights": "hash of ", "preprocessing": "means of 4×4 blocks"}
    }
    assert scored["reference"]["name"] == "train split of fake"
    assert len(scored["reference"]["hash"]) == 64
    assert "3 neighbors" in scored["protocols"]["precision_recall"]


def test_the_batch_size_of_sampling_changes_no_score(scored, tmp_path):
    assert_same_figures(score(plain_sampler(sampling__batch_size=7), tmp_path), scored)


@pytest.fixture
def interrupted(monkeypatch):
    """The first images of the parts that were drawn; the third part is interrupted."""
    monkeypatch.setattr("dig_jax.evaluation.store._SAVE_EVERY", -1)
    drawn, parts = [], GeneratedImages.parts

    def some(self, first, size, stop):
        for indices, images in parts(self, first, size, stop):
            drawn.append(indices[0])
            if len(drawn) == 3:
                raise KeyboardInterrupt
            yield indices, images

    monkeypatch.setattr(GeneratedImages, "parts", some)
    return drawn


def test_a_killed_evaluation_resumes_and_gives_the_same_scores(scored, tmp_path, interrupted, caplog):
    with pytest.raises(KeyboardInterrupt):
        score(plain_sampler(), tmp_path, resume=tmp_path)
    with caplog.at_level(logging.INFO, "dig_jax"):
        scores = score(plain_sampler(), tmp_path, resume=tmp_path)
    assert "resuming: the features of 10 of 30 images already exist" in caplog.messages
    assert interrupted == [0, 10, 20, 10, 20]
    assert_same_figures(scores, scored)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.json", "reference.npz"}


def test_a_killed_evaluation_resumes_in_object_storage(scored, bucket, interrupted, monkeypatch, caplog):  # noqa: F811
    settings, folder = tiny_settings(**FEW), to_path(f"{bucket}/run")
    monkeypatch.setattr(evaluate, "load", lambda *arguments, **options: plain_sampler())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalFolder, "push", lambda self: None)  # a killed process uploads nothing at its end
        evaluate.evaluate(settings, folder)
    with caplog.at_level(logging.INFO, "dig_jax"):
        assert_same_figures(evaluate.evaluate(settings, folder), scored)
    assert interrupted == [0, 10, 20, 10, 20]
    assert "images of the reference" not in caplog.text
    names = {path.name for path in children(folder)}
    assert names >= {"scores.json", "reference.npz"} and not any("features" in name for name in names)


def test_two_processes_of_four_devices_that_were_killed_resume_and_score_like_one(scored, tmp_path):
    fields = json.dumps(FEW | {"sampling__batch_size": 4})  # parts of 8 images for two processes

    def run(parts, count):
        environ = os.environ | GLOO | {"PYTHONPATH": os.pathsep.join(sys.path)}  # with four devices
        numbers = map(str, (parts, free_port(), count))
        command = [sys.executable, "tests/process_scores.py", tmp_path, fields, *numbers]
        processes = [subprocess.Popen([*command, str(number)], env=environ) for number in range(count)]
        return [process.wait() for process in processes]

    assert run(parts=3, count=2) == [9, 9]
    with np.load(tmp_path / "features.npz") as stored:
        assert sorted(stored["inception:indices"]) == list(range(16))
    assert run(parts=0, count=2) == [0, 0]
    assert [(tmp_path / f"devices {number}").read_text() for number in range(2)] == ["8", "8"]
    assert_same_figures(json.loads((tmp_path / "scores.json").read_text()), scored)
    assert not (tmp_path / "features.npz").exists()


def test_the_summary_names_numbers_images_and_reference(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "dig_jax"):
        scores = score(plain_sampler(), tmp_path)
    line = caplog.messages[-1]
    assert line.startswith(f"fid {scores['fid']:.5g}, is_torch_fidelity ")
    assert line.endswith("(30 images, reference: train split of fake)")
    assert any("images/s, ETA" in message or "image/s, ETA" in message for message in caplog.messages)


def test_labels_are_balanced_or_random():
    balanced = GeneratedImages(plain_sampler(), 200).labels
    np.testing.assert_array_equal(np.bincount(balanced), [40] * 5)
    random = GeneratedImages(plain_sampler(evaluation__labels="random"), 200).labels
    assert len(set(np.bincount(random))) > 1
    again = GeneratedImages(plain_sampler(evaluation__labels="random"), 200).labels
    np.testing.assert_array_equal(again, random)


def test_pixels_are_rounded_or_truncated():
    x = np.array([-1.2, -1, -0.9999, 0, 0.0039, 0.9999, 1, 3], np.float32)
    np.testing.assert_array_equal(to_pixels(x), [0, 0, 0, 128, 128, 255, 255, 255])
    np.testing.assert_array_equal(to_pixels(x, "truncate"), [0, 0, 0, 127, 127, 254, 255, 255])
    images = [
        plain_sampler(sampling__uint8=rule)(seeds=range(4)).astype(int) for rule in ("round", "truncate")
    ]
    assert set(np.unique(images[0] - images[1])) == {0, 1}


def test_images_that_are_not_finite_name_the_seed(monkeypatch):
    sampler = plain_sampler()
    draw = Sampler.counted

    def broken(self, labels=None, **options):
        x, counted = draw(self, labels, **options)
        x = x.copy()
        x[2, 0, 0, 0] = np.nan
        return x, counted

    monkeypatch.setattr(Sampler, "counted", broken)
    with pytest.raises(
        UserError, match="the image of seed 2 is not finite: got NaN or infinity from step 7"
    ) as raised:
        list(GeneratedImages(sampler, 30).parts(0, 10, 30))
    assert "dtype" not in str(raised.value)  # which cannot change after training


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"evaluation__scores": "fid,fud"}, "evaluation.scores: unknown score 'fud'; .*; did you mean 'fid'"),
        (
            {"evaluation__num_images": 4},
            "num_images=4 is less than the number of classes, 5",
        ),
        ({"evaluation__reference": "none"}, "invalid config.evaluation.reference='none': no such folder"),
        (
            {"checkpoint__keep_best_by": "fidd"},
            "keep_best_by='fidd'; expected heldout_loss, fid.*mean 'fid'",
        ),
        ({"checkpoint__keep_best_by": "fid"}, "needs scores in training; set config.evaluation.every_steps"),
    ],
    ids=["score", "classes", "reference", "figure", "never measured"],
)
def test_training_refuses_invalid_settings_of_scores_before_it_starts(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(tiny_settings(**FEW | changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_weights_end_training_before_it_starts(tmp_path, monkeypatch):
    def missing(name, source):
        raise UserError(f"no weights of {name}")

    monkeypatch.setattr(feature_scores, "_network", missing)
    with pytest.raises(UserError, match="no weights of inception"):
        train(tiny_settings(**FEW), tmp_path / "run")


def test_too_few_images_for_a_score_name_the_score(tmp_path):
    changes = {"evaluation__num_images": 5, "evaluation__scores": "is_torch_fidelity"}
    with pytest.raises(ConfigError, match="scores: is_torch_fidelity: too few images: got 5; expected"):
        score(plain_sampler(**changes), tmp_path)


@pytest.mark.slow
def test_training_scores_every_n_steps_and_keeps_the_best_checkpoint(tmp_path, monkeypatch):
    """FID, which the test fixes, is best at step 2; the newest checkpoint is kept, too."""
    values = {2: 3.0, 4: 5.0, 6: 4.0}

    def fixed(run, state):
        return {"fid": values[int(state["step"])], "num_images": 30}

    monkeypatch.setattr(training, "Components", PixelComponents)
    monkeypatch.setattr(Run, "score", fixed)
    monkeypatch.setattr(training, "_finish", lambda run, state, writer: run.score(state))
    settings = tiny_settings(
        **FEW
        | {
            "evaluation__scores": "fid",
            "evaluation__every_steps": 2,
            "training__steps": 6,
            "checkpoint__every_steps": 2,
            "checkpoint__keep": 1,
            "checkpoint__keep_best_by": "fid",
            "logging__heldout_every_steps": 0,
            "sampling__every_steps": 0,
        }
    )
    assert train(settings, tmp_path) == {"fid": 4, "num_images": 30}
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"2", "6"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: (row["fid"], row["scored_images"]) for row in rows if "fid" in row}
    assert measured == {step: (value, 30) for step, value in values.items()}


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_checkpoints_are_kept_by_the_lowest_metric(higher_is_better, tmp_path):
    settings = tiny_settings(checkpoint__keep=1, checkpoint__keep_best_by="is")
    sign = -1 if higher_is_better else 1
    with Checkpoints(tmp_path, settings.checkpoint) as checkpoints:
        for step, value in ((1, 5.0), (2, 9.0), (3, None), (4, float("nan"))):
            metric = None if value is None else sign * value
            checkpoints.save(step, {"step": jnp.int32(step)}, {}, settings, metric=metric)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"4", "2" if higher_is_better else "1"}


def test_a_checkpoint_directory_is_scored_into_its_workdir_or_output(tmp_path):
    settings = tiny_settings(**FEW | {"evaluation__scores": "kid"})
    write_checkpoint(tmp_path, settings)
    scores = evaluate.evaluate(settings, tmp_path / "checkpoints" / "7")
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    evaluate.evaluate(settings, tmp_path, tmp_path / "other")
    assert (tmp_path / "other" / "scores.json").exists()


def test_folders_are_scored_against_folders_without_a_model(tmp_path):
    real, fake = random_images(0, 40), random_images(1, 30)
    np.savez(tmp_path / "real.npz", arr_0=real)
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    settings = tiny_settings(evaluation__scores="fid,kid", evaluation__reference=str(tmp_path / "real.npz"))
    scores = evaluate_images(settings, tmp_path / "fake.npz", tmp_path / "out")
    assert scores["num_images"] == 30
    assert scores["images"] == str(tmp_path / "fake.npz")
    assert scores["reference"]["name"] == str(tmp_path / "real.npz")
    same = evaluate_images(settings, tmp_path / "real.npz", tmp_path / "same")
    assert same["fid"] < 1e-6 < scores["fid"]


def test_images_without_scores_or_of_another_size_than_the_reference_are_errors(tmp_path):
    np.savez(tmp_path / "fake.npz", arr_0=random_images(1, 30, size=16))
    with pytest.raises(ConfigError, match="nothing to evaluate: got config.evaluation.scores=''"):
        evaluate_images(tiny_settings(), tmp_path / "fake.npz", tmp_path)
    settings = tiny_settings(**FEW)
    with pytest.raises(ConfigError, match="has images of 8×8 px and 3 channels; expected 16×16 px"):
        evaluate_images(settings, tmp_path / "fake.npz", tmp_path)
    with pytest.raises(ConfigError, match="--images: no such folder or file: .*nothing.npz"):
        evaluate_images(settings, tmp_path / "nothing.npz", tmp_path)
