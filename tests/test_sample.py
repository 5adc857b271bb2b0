import contextlib
import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_autoencoder import write_autoencoder
from tiny_components import PlainComponents, tiny_settings, write_checkpoint

import dig_jax
from dig_jax import ConfigError, Sampler
from dig_jax.autoencoder import to_uint8
from dig_jax.data import ImageSpec
from dig_jax.errors import UserError
from dig_jax.sampling import sample as image_set

CATS = ImageSpec((4, 6, 4), ("n02123045", "n02099601", "siamese"))


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a set in `.workdir` and gives what generated.npz holds; `.drawn`: the seeds drawn so far."""
    (tmp_path / "run").mkdir()

    def sample(labels=None, seeds=None, known=None, params=(), **changes):
        settings = tiny_settings(**{"sampling__batch_size": 2, "sampling__steps": 3} | changes)
        sampler = Sampler(PlainComponents(settings, known), dict(params), step=7)
        sample.sampler = sampler
        monkeypatch.setattr(image_set, "load", lambda *_, **__: sampler)
        call = Sampler.__call__

        def noted(self, labels, *, seeds):
            images = call(self, labels, seeds=seeds)
            sample.drawn += np.asarray(seeds).tolist()
            return images

        monkeypatch.setattr(sampler.__class__, "__call__", noted)
        try:
            image_set.sample(settings, tmp_path / "run", lambda names: labels, seeds)
        finally:
            monkeypatch.setattr(sampler.__class__, "__call__", call)
        with np.load(tmp_path / "run" / "generated.npz") as file:
            return dict(file)

    sample.drawn, sample.workdir = [], tmp_path / "run"
    return sample


def test_sampled_images_are_written_as_evaluators_read_them(draw):
    written = draw([1, 4, 2], np.array([7]))
    assert set(written) == {"arr_0", "labels", "seeds"}
    assert written["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(written["arr_0"], draw.sampler([1, 4, 2], seeds=7))
    np.testing.assert_array_equal(written["labels"], [1, 4, 2])
    np.testing.assert_array_equal(written["seeds"], [7, 7, 7])
    with Image.open(draw.workdir / "generated.png") as picture:
        assert picture.format == "PNG"
    assert {path.name for path in draw.workdir.iterdir()} == {"generated.npz", "generated.png"}


def test_of_latents_without_an_autoencoder_there_are_only_numbers_one_image_of_each_class(draw):
    written = draw(data__options={"image_size": 4, "channels": 4, "num_classes": 5, "length": 60})
    assert written["arr_0"].shape == (5, 4, 4, 4)
    for name in ("labels", "seeds"):
        np.testing.assert_array_equal(written[name], range(5))
    assert [path.name for path in draw.workdir.iterdir()] == ["generated.npz"]


def test_a_set_that_was_interrupted_is_finished_without_drawing_again_and_is_the_same(draw, monkeypatch):
    seeds = np.arange(7)
    whole = draw(seeds=seeds)
    assert draw.drawn == seeds.tolist()
    draw.drawn.clear()

    def broken(self, x):
        if len(draw.drawn) == 4:
            raise KeyboardInterrupt
        return pictures(self, x)

    pictures = Sampler._pictures
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Sampler, "_pictures", broken)
        draw(seeds=seeds)
    parts = draw.workdir / "generated"
    assert sorted(path.name for path in parts.iterdir()) == ["00000000.npy", "00000002.npy", "set.json"]
    (parts / "00000002.npy").write_bytes((parts / "00000002.npy").read_bytes()[:-1])  # a damaged one
    again = draw(seeds=seeds)
    assert draw.drawn == [0, 1, 2, 3, 2, 3, 4, 5, 6]
    assert whole.keys() == again.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(again[name], values)
    assert not parts.exists()


def test_the_parts_of_a_set_are_shared_among_processes(draw, tmp_path):
    seeds = np.arange(7)
    whole = draw(seeds=seeds)["arr_0"]
    parts = image_set._Parts(tmp_path / "parts", draw.sampler, seeds % 5, seeds)
    parts.claim()
    for index in (2, 0, 1):
        parts.draw(index=index, count=3)
    np.testing.assert_array_equal(np.concatenate(list(parts.read())), whole)
    assert draw.sampler.picture_shape == whole.shape[1:]


def test_parts_of_another_set_are_not_mixed_in_and_not_deleted(draw, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(image_set, "_collect", _interrupt)
        draw(seeds=np.arange(4))
    before = {path: path.read_bytes() for path in (draw.workdir / "generated").iterdir()}
    assert len(before) == 3
    for changes, message in [
        ({"sampling__steps": 2}, "steps: 3 → 2"),
        ({"seeds": np.arange(5)}, "images: 4 → 5"),
        ({"seeds": np.arange(1, 5)}, "labels and seeds: "),
    ]:
        with pytest.raises(ConfigError, match=f"has parts of another set .*{message}.* or delete it"):
            draw(**{"seeds": np.arange(4)} | changes)
    assert before == {path: path.read_bytes() for path in (draw.workdir / "generated").iterdir()}
    (draw.workdir / "generated" / "set.json").write_text("[")
    with pytest.raises(UserError, match=r"set.json cannot be read: .*; delete "):
        draw(seeds=np.arange(4))


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_set_of_which_only_a_damaged_part_is_missing_is_finished(draw, monkeypatch):
    seeds = np.arange(4)
    whole = draw(seeds=seeds)["arr_0"]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(image_set, "_collect", _interrupt)
        draw(seeds=seeds)
    (draw.workdir / "generated" / "00000002.npy").write_bytes(b"")
    np.testing.assert_array_equal(draw(seeds=seeds)["arr_0"], whole)


def test_parts_without_a_record_of_their_set_are_never_left(draw, monkeypatch):
    deleted, unlink = [], Path.unlink

    def interrupted(path, **options):
        if path.suffix == ".npy" and deleted:
            raise KeyboardInterrupt
        deleted.extend([path] if path.suffix == ".npy" else [])
        unlink(path, **options)

    def rmtree(directory):
        for path in sorted(directory.iterdir(), reverse=True):  # in whatever order the disk has them
            interrupted(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", interrupted)
        patched.setattr(shutil, "rmtree", rmtree)
        draw(seeds=np.arange(4))
    with pytest.raises(ConfigError, match="has parts of another set"):
        draw(seeds=np.arange(4, 8))
    np.testing.assert_array_equal(draw(seeds=np.arange(4))["seeds"], range(4))


def test_what_somebody_else_keeps_in_the_place_of_the_parts_is_left_alone(draw):
    (draw.workdir / "generated").mkdir()
    (draw.workdir / "generated" / "best.png").write_text("a picture")
    with pytest.raises(ConfigError, match="generated has other things than a set in it: move them elsewhere"):
        draw(seeds=np.arange(2))
    assert (draw.workdir / "generated" / "best.png").read_text() == "a picture"


def test_parts_that_other_parameters_or_another_precision_drew_are_not_mixed_in(draw, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(image_set, "_collect", _interrupt)
        draw(seeds=np.arange(2))
    with pytest.raises(ConfigError, match="another set .autoencoder.dtype: float32 → bfloat16"):
        draw(seeds=np.arange(2), autoencoder__dtype="bfloat16")
    with pytest.raises(ConfigError, match="another set .values of the parameters: "):
        draw(seeds=np.arange(2), params={"bias": np.ones(3, np.float32)})


@pytest.mark.parametrize("name", ["00000000.npy", "generated.npz"])
def test_a_full_disk_is_told_in_one_line_and_the_set_goes_on(draw, monkeypatch, name):
    @contextlib.contextmanager
    def full(path):
        raise OSError(f"{path.name} requested and 0 written")
        yield

    replacing = image_set.replacing
    message = f"cannot write to .*: {name} requested"
    with monkeypatch.context() as patched, pytest.raises(UserError, match=message):
        patched.setattr(image_set, "replacing", lambda path: (full if path.name == name else replacing)(path))
        draw(seeds=np.arange(2))
    assert draw(seeds=np.arange(2))["arr_0"].shape[0] == 2


def test_the_picture_of_an_earlier_set_does_not_outlive_it(draw):
    draw(seeds=np.arange(2))
    assert (draw.workdir / "generated.png").exists()
    draw(data__options={"image_size": 4, "channels": 4, "num_classes": 5, "length": 60})
    assert not (draw.workdir / "generated.png").exists()


def test_a_record_of_what_the_parts_depend_on_lies_beside_them(draw, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(image_set, "_collect", _interrupt)
        draw(seeds=np.arange(4), sampling__ema="0.99")
    described = json.loads((draw.workdir / "generated" / "set.json").read_text())
    expected = {"step": 7, "parameters": "0.99", "sampler": "ddim", "steps": 3, "images": 4}
    assert described | expected == described


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ([9], {}, r"--labels.*: label 9 is out of range"),
        (None, {"sampling__steps": 1}, r"config.sampling: too few steps: got 1; expected at least 2"),
    ],
)
def test_samples_that_cannot_be_are_blamed_on_their_setting(labels, changes, message, tmp_path):
    settings = tiny_settings(**changes)
    write_checkpoint(tmp_path, settings)
    with pytest.raises(ConfigError, match=message):
        image_set.sample(settings, tmp_path, lambda names: labels)


def latent_settings(folder, **changes):
    changes = {"data__name": "latents", "data__options": {}, "autoencoder__path": str(folder)} | changes
    return tiny_settings(sampling__steps=2, sampling__batch_size=3, **changes)


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory):
    """A workdir whose latents are nowhere, and the folder of its autoencoder."""
    folder = write_autoencoder(tmp_path_factory.mktemp("autoencoder"))
    workdir = tmp_path_factory.mktemp("run")
    write_checkpoint(workdir, latent_settings(folder), known=CATS)
    return workdir, folder


@functools.cache
def loaded(workdir):
    return dig_jax.load(workdir)


def test_latents_are_decoded_by_the_autoencoder_that_the_config_names(latent_run):
    sampler = loaded(latent_run[0])
    latents = sampler([0, 1], seeds=[3, 4], return_latents=True)
    pictures = sampler([0, 1], seeds=[3, 4])
    assert latents.shape == (2, 4, 6, 4)
    factor = sampler.components.autoencoder.config.downsampling
    assert pictures.shape == (2, 4 * factor, 6 * factor, 3) == (2, *sampler.picture_shape)
    expected = np.asarray(to_uint8(sampler.components.autoencoder.decode(latents)))
    assert np.abs(pictures.astype(int) - expected).max() <= 1
    trajectory = sampler.trajectory([0], steps=3)
    assert trajectory.shape == (3, 1, *sampler.picture_shape)


def test_decoding_in_parts_changes_nothing(latent_run, monkeypatch):
    sampler = loaded(latent_run[0])
    whole = sampler(seeds=range(5)).astype(int)
    monkeypatch.setattr("dig_jax.sampling.sampler._DECODED", 1)
    assert np.abs(sampler(seeds=range(5)) - whole).max() <= 1


def test_classes_are_drawn_by_name_even_where_the_data_are_elsewhere(latent_run):
    sampler = loaded(latent_run[0])
    labels, _ = sampler.resolve(["golden retriever", "tabby", 2, "Siamese"], None)
    np.testing.assert_array_equal(labels, [1, 0, 2, 2])
    np.testing.assert_array_equal(sampler.resolve("golden_retriever", None)[0], [1])
    with pytest.raises(ValueError, match="no class 'golden retreiver'; did you mean 'golden retriever'"):
        sampler("golden retreiver")


def test_the_size_of_pictures_of_latents_is_in_pixels(latent_run):
    sampler = loaded(latent_run[0])
    factor = sampler.components.autoencoder.config.downsampling
    assert sampler(size=(2 * factor, 4 * factor)).shape == (1, 2 * factor, 4 * factor, 3)
    patch = factor * sampler.components.abstract_model.patch_size
    assert patch > factor
    for size in (0, 3, factor, (patch, patch + factor)):
        message = re.escape(f"size={size} must be positive and a multiple of {patch} pixels")
        with pytest.raises(ValueError, match=message):
            sampler(size=size)


def test_another_autoencoder_may_be_given(latent_run, tmp_path):
    sampler = dig_jax.load(latent_run[0], autoencoder=tmp_path / "none")
    with pytest.raises(ConfigError, match=r"config.autoencoder.path: .*none: there is no such folder"):
        sampler()
    assert dig_jax.load(latent_run[0], autoencoder=latent_run[1])().shape[-1] == 3


def test_a_set_of_decoded_pictures_is_written_with_titles(latent_run):
    workdir, folder = latent_run
    image_set.sample(latent_settings(folder), workdir, lambda names: [0, 1, 2, 1])
    with np.load(workdir / "generated.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], loaded(workdir)([0, 1, 2, 1]))
    with Image.open(workdir / "generated.png") as picture:
        assert picture.width > 4 * loaded(workdir).picture_shape[1]
