"""Features of the training images that are read from disk, for representation alignment."""

import dataclasses
import functools
import json
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_auxiliary import REPA, ToyComponents, assert_close, gradient, toy
from test_pipeline import Numbered

from dig_jax.data import batches, normalize
from dig_jax.data.features import new_features, open_features
from dig_jax.errors import ConfigError, UserError
from dig_jax.models.embeddings import patchify
from dig_jax.testing import random_params, tiny_settings
from dig_jax.training.compile import abstract_batch
from dig_jax.training.objectives.auxiliary import losses
from dig_jax.training.restore import check_same_data
from dig_jax.training.run import Run
from dig_jax.training.train import train
from dig_jax.training.train_setup import TrainSetup

IMAGES = 60  # of `tiny_settings`


def encoder(images):
    """An encoder whose features are exact in float16: rounded pixels of a token."""
    return patchify(jnp.round(16 * images), 2)


def write(folder, plain, mirrored=None, **about):
    arrays = [plain] if mirrored is None else [plain, mirrored]
    with new_features(folder, len(plain), mirrored is not None, about) as append:
        append(*(array[:5] for array in arrays))
        append(*(array[5:] for array in arrays))
    return folder


def with_features(folder, **changes):
    """Toy components that read features from a folder."""
    fields = toy(**REPA, **changes).config
    auxiliary = dataclasses.replace(fields.auxiliary, repa_features=str(folder))
    return ToyComponents(dataclasses.replace(fields, auxiliary=auxiliary))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Features that `encoder` computes for the images of `tiny_settings`."""
    source = toy().train_source
    images = normalize(np.stack([source[index]["image"] for index in range(IMAGES)]))
    both = [np.asarray(encoder(x)).reshape(IMAGES, 2, 2, -1) for x in (images, images[:, :, ::-1])]
    return write(tmp_path_factory.mktemp("written") / "features", *both, images=source.fingerprint)


def test_stored_features_give_the_loss_and_the_gradient_of_their_encoder(folder):
    """On batches of the pipeline, half of whose images are mirrored."""
    stored = with_features(folder, data__flip=True)
    called = ToyComponents(toy(**REPA).config, features=encoder)
    source = stored.train_source
    stream = batches(source, batch_size=8, seed=0, flip=True, num_threads=0, features=stored.stored_features)
    with closing(stream):
        batch = jax.tree.map(jnp.asarray, next(stream))
    shapes = {name: (x.shape, x.dtype) for name, x in batch.items()}
    mesh = jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "context", "tensor"))
    assert {name: (x.shape, x.dtype) for name, x in abstract_batch(stored, mesh).items()} == shapes
    setups = TrainSetup.of(stored), TrainSetup.of(called)
    params = random_params(called)
    without = {name: x for name, x in batch.items() if name != "features"}
    got, expected = (
        jax.jit(functools.partial(gradient, setup))(params, one)
        for setup, one in zip(setups, (batch, without), strict=True)
    )
    assert expected[1]["repa_loss"] > 0
    assert_close(got, expected, rtol=1e-5)


def test_each_image_comes_with_its_own_features_from_any_start(tmp_path):
    """The features of image i are i, and -i - 1 for its mirror image."""
    plain = np.arange(20.0).reshape(20, 1, 1, 1)
    stored = open_features(str(write(tmp_path / "features", plain, -plain - 1)))
    taken = []
    for start in (0, 16):
        with closing(
            batches(Numbered(20), batch_size=8, seed=3, start=start, flip=True, features=stored)
        ) as stream:
            taken.append([next(stream) for _ in range(4)])
    for batch in taken[0]:
        mirrored = batch["image"][:, 0, 0, 0] > 0
        expected = np.where(mirrored, -batch["label"] - 1, batch["label"])
        np.testing.assert_array_equal(batch["features"][:, 0, 0, 0], expected)
        assert 0 < mirrored.sum() < 8
    np.testing.assert_array_equal(taken[0][2]["features"], taken[1][0]["features"])


def test_features_are_not_read_after_their_loss_has_ended(tmp_path):
    stored = open_features(str(write(tmp_path / "features", np.ones((20, 1, 1, 1)))))
    with closing(
        batches(Numbered(20), batch_size=8, seed=3, features=stored, features_end=16, num_threads=0)
    ) as stream:
        used = [next(stream)["features"].ravel().tolist() for _ in range(3)]
    assert used == [[1.0] * 8, [1.0] * 8, [0.0] * 8]


def test_features_end_with_their_loss_after_the_batch_size_has_changed(folder, tmp_path):
    """Two steps with batches of 4, then steps with batches of 8; the loss ends after step 4."""
    mesh = jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "context", "tensor"))
    run = Run(with_features(folder, data__batch_size=8, auxiliary__until=4), mesh, tmp_path, tmp_path)
    with closing(run.batches(2, 8)) as stream:
        assert [bool(next(stream)["features"].any()) for _ in range(4)] == [True, True, False, False]


def test_features_of_another_grid_are_resized_in_place():
    """A linear ramp stays one, except at the border, where a coarser grid ends."""
    ramp = jnp.broadcast_to(jnp.arange(8.0)[:, None, None], (8, 4, 1))[None].astype(jnp.float16)
    coarse = losses.at_grid(ramp, (4, 2)).reshape(4, 2)
    np.testing.assert_allclose(coarse[1:3, 0], [2.5, 4.5], atol=1e-3)
    np.testing.assert_allclose(coarse[:, 0], coarse[:, 1], rtol=1e-6)
    same = losses.at_grid(ramp, (8, 4))
    np.testing.assert_array_equal(same[0, :, 0], np.repeat(np.arange(8), 4))


def test_a_run_resumes_only_with_the_same_features(folder, tmp_path):
    arrays = [np.load(folder / name) for name in ("plain.npy", "mirrored.npy")]
    other = write(tmp_path / "features", *[array + 1 for array in arrays])
    mesh = jax.make_mesh((1, 1, 1, 1), ("data", "fsdp", "context", "tensor"))
    first, second = (Run(with_features(path), mesh, tmp_path, tmp_path) for path in (folder, other))
    check_same_data(first, first.data_item(8))
    with pytest.raises(ConfigError, match="trained on different data: features"):
        check_same_data(second, first.data_item(8))


@pytest.mark.slow
def test_a_run_trains_on_stored_features(folder, tmp_path):
    fields = {"auxiliary__repa_weight": 0.5, "auxiliary__repa_features": str(folder)}
    fields |= {"model__patch_size": 2, "evaluation__num_images": 0, "sampling__every_steps": 0}
    fields |= {"logging__every_steps": 1, "logging__heldout_every_steps": 0}
    train(tiny_settings(**fields, training__steps=1), tmp_path)
    rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert any(row.get("repa_loss", 0) > 0 for row in rows)


def corrupt_json(folder):
    (folder / "features.json").write_text("{")


def newer(folder):
    (folder / "features.json").write_text('{"format": 2}')


def cut(folder):
    (folder / "plain.npy").write_bytes((folder / "plain.npy").read_bytes()[:-2])


def longer(folder):
    (folder / "mirrored.npy").write_bytes((folder / "mirrored.npy").read_bytes() + b"00")


def no_header(folder):
    (folder / "plain.npy").write_bytes(b"")


def pickled(folder):
    np.save(folder / "plain.npy", np.array([None]), allow_pickle=True)


def other_dtype(folder):
    np.save(folder / "plain.npy", np.zeros((IMAGES, 2, 2, 4), np.float32))


def other_shape(folder):
    np.save(folder / "mirrored.npy", np.zeros((IMAGES, 2, 2, 3), np.float16))


def fewer(folder):
    for name in ("plain.npy", "mirrored.npy"):
        np.save(folder / name, np.zeros((5, 2, 2, 4), np.float16))


def other_images(folder):
    (folder / "features.json").write_text('{"format": 1, "images": "0123"}')


def another_grid(folder):
    for name in ("plain.npy", "mirrored.npy"):
        np.save(folder / name, np.zeros((IMAGES, 2, 3, 4), np.float16))


BAD = {
    "missing": (lambda folder: (folder / "plain.npy").unlink(), "no features in .*: plain.npy is missing"),
    "corrupt JSON": (corrupt_json, "features.json is corrupt: invalid JSON"),
    "newer": (newer, "unsupported format of .*features.json: got 2; expected 1"),
    "cut": (cut, "plain.npy is corrupt: mmap length is greater than file size"),
    "longer": (longer, r"mirrored.npy is corrupt: got [\d,]+ bytes; expected [\d,]+$"),
    "no header": (no_header, "plain.npy is corrupt: No data left in file"),
    "pickled": (pickled, "plain.npy is corrupt: Array can't be memory-mapped"),
    "other dtype": (other_dtype, r"got float32 of shape \(60, 2, 2, 4\); expected float16 \[images, rows"),
    "other shape": (other_shape, r"got shape \(60, 2, 2, 3\); expected that of plain.npy, \(60, 2, 2, 4\)"),
    "fewer": (fewer, "got 5 images; expected the 60 training images of config.data"),
    "other images": (other_images, "got those of images with fingerprint 0123; expected [0-9a-f]{16}"),
    "no mirror images": (
        lambda folder: (folder / "mirrored.npy").unlink(),
        "missing .*mirrored.npy; expected the features of the mirror images, or config.data.flip=False",
    ),
    "another grid": (another_grid, "got a grid of 2 × 3; expected 2 × 2, as in the model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_features_end_with_one_line(folder, tmp_path, name):
    change, message = BAD[name]
    copy = tmp_path / "features"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    change(copy)
    fields = {"auxiliary__repa_weight": 0.5, "auxiliary__repa_features": str(copy), "data__flip": True}
    with pytest.raises(ConfigError, match=message) as raised:
        train(tiny_settings(model__patch_size=2, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert str(raised.value).startswith("config.auxiliary") and "\n" not in str(raised.value)


def test_an_encoder_and_stored_features_exclude_each_other(folder):
    components = ToyComponents(with_features(folder).config, features=encoder)
    with pytest.raises(ConfigError, match="repa_features: unsupported together with an encoder"):
        TrainSetup.of(components)


def test_object_storage_is_refused_and_folders_are_not_overwritten(folder):
    with pytest.raises(UserError, match="gs://bucket/features: in object storage; expected a local one"):
        open_features("gs://bucket/features")
    with pytest.raises(UserError, match="exists; expected a new folder"):
        write(folder, np.zeros((6, 1, 1, 1)))


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with (
        pytest.raises(UserError, match="got 2 images; expected 3"),
        new_features(tmp_path / "features", 3, False, {}) as append,
    ):
        append(np.zeros((2, 1, 1, 1)))
    assert not list(tmp_path.iterdir())
