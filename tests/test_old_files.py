"""Files of commit 8207f23, before the layout changed, still work: a workdir, an export, a latent cache."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from jax_options import unoptimized

import dig_jax
from dig_jax.data import load_source
from dig_jax.testing import tiny_settings
from dig_jax.training import hooks
from dig_jax.training.train import train

ARCHIVE = Path(__file__).parent / "golden" / "version_0_1.tar.xz"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    root = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    return root


def rows(path):
    return {row["step"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_an_old_workdir_resumes_as_if_the_code_had_not_changed(old, tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "draw_samples", lambda sampler, workdir: None)
    workdir = shutil.copytree(old / "workdir", tmp_path / "workdir")
    settings = tiny_settings(
        training__steps=8,
        training__ema_decays=(0.9,),
        checkpoint__every_steps=4,
        checkpoint__keep=1,
        logging__every_steps=2,
        logging__heldout_every_steps=4,
        sampling__every_steps=0,
    )
    with unoptimized():
        train(settings, workdir)
    resumed, straight = rows(workdir / "metrics.jsonl"), rows(old / "metrics_of_8_steps.jsonl")
    assert list(resumed) == list(straight) == [2, 4, 6, 8]
    for step in (6, 8):
        for name in ("loss", "grad_norm", "learning_rate", "loss_q1", "loss_q2", "loss_q3", "loss_q4"):
            assert resumed[step][name] == pytest.approx(straight[step][name], rel=1e-4)
    assert resumed[8]["heldout_loss"] == pytest.approx(straight[8]["heldout_loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["workdir", "export.safetensors"])
def test_old_parameters_draw_the_same_images(old, name):
    images = dig_jax.load(old / name)(labels=[0, 1, 2], seeds=[5, 6, 7], steps=3, guidance_scale=2.0)
    assert np.abs(images.astype(int) - np.load(old / "images.npy")).max() <= 1


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_an_old_latent_cache_reads_the_same_posteriors(old, split):
    source = load_source("latents", split, path=str(old / "latents"))
    expected = np.load(old / "posteriors.npz")
    assert source.fingerprint == str(expected[f"{split}/fingerprint"])
    read = [source.posterior(index, mirrored) for index in range(len(source)) for mirrored in (False, True)]
    np.testing.assert_array_equal([label for label, *_ in read], expected[f"{split}/label"])
    moments = np.stack([np.concatenate(moments, axis=-1) for _, *moments in read])
    np.testing.assert_array_equal(moments, expected[f"{split}/moments"])
