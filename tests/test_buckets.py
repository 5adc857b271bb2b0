"""Buckets of aspect ratios: which images share a batch, and training on batches of several sizes."""

import itertools
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from ended_runs import assert_ended_alike
from jax_options import unoptimized
from PIL import ExifTags, Image
from test_data_images import noise
from test_resume import interrupt

from dig_jax.components import Components
from dig_jax.data import batches, load_source
from dig_jax.data.buckets import Buckets, parse_buckets
from dig_jax.data.images import native_size
from dig_jax.errors import ConfigError
from dig_jax.testing import tiny_settings
from dig_jax.training import train

SIZES = ((4, 4), (2, 8), (8, 2))
TEXT = "4x4,2x8,8x2"
BATCH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 squares, 8 wide and 4 tall images, each with a gray level of its own."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "images").mkdir()
    shapes = [(9, 9)] * 12 + [(6, 20)] * 8 + [(30, 11)] * 4
    for number, (height, width) in enumerate(shapes):
        image = Image.new("L", (width, height), 10 * number)
        image.save(root / "images" / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def source(folder):
    options = {"image_size": 4, "channels": 1, "heldout_fraction": 0.0}
    return load_source("image_folder", "train", path=str(folder), **options)


@pytest.fixture(scope="module")
def buckets(source):
    return Buckets(source, SIZES, batch_size=BATCH, seed=5)


def stream(source, buckets, count, **options):
    """The first batches: their sizes, and the numbers of their images."""
    options = {"batch_size": BATCH, "seed": 5, "num_threads": 0, "buckets": buckets, **options}
    with closing(batches(source, **options)) as data:
        images = [batch["image"] for batch in itertools.islice(data, count)]
    return [(x.shape[1:3], np.rint((x[:, 0, 0, 0] + 1) * 127.5 / 10).astype(int).tolist()) for x in images]


def test_each_batch_has_the_size_nearest_to_the_shape_of_its_images(source, buckets):
    belongs = {(4, 4): range(12), (2, 8): range(12, 20), (8, 2): range(20, 24)}
    seen = stream(source, buckets, 20)
    assert {size for size, _ in seen} == set(SIZES)
    for size, numbers in seen:
        assert set(numbers) <= set(belongs[size])


def test_all_images_are_seen_equally_often_in_an_order_that_changes(source, buckets):
    seen = stream(source, buckets, 24)  # 6 batches hold 24 images
    cycles = [seen[first : first + 6] for first in range(0, 24, 6)]
    for cycle in cycles:
        assert sorted(sum((numbers for _, numbers in cycle), [])) == list(range(24))
    assert len({tuple(size for size, _ in cycle) for cycle in cycles}) > 1


def test_a_run_goes_on_exactly_from_any_step(source, buckets):
    whole = stream(source, buckets, 14)
    for steps in (1, 5, 8):
        assert stream(source, buckets, 14 - steps, start=steps * BATCH) == whole[steps:]


def test_processes_share_the_batches_of_a_single_process(source, buckets):
    whole = stream(source, buckets, 9)
    shards = [stream(source, buckets, 9, process_index=index, process_count=2) for index in range(2)]
    for (size, numbers), (first, some), (second, others) in zip(whole, *shards, strict=True):
        assert size == first == second
        assert numbers == some + others


def test_the_order_of_a_seed_never_changes(source, buckets):
    """Runs are resumed across versions: if this fails, old checkpoints no longer continue exactly."""
    seen = stream(source, buckets, 7)
    assert [SIZES.index(size) for size, _ in seen] == [1, 0, 2, 0, 1, 0, 0]
    assert seen[0][1] == [15, 18, 14, 16]


def test_the_size_of_an_image_is_read_from_its_header_and_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(noise(90, 60)).save(tmp_path / "turned.jpg", exif=exif)
    data = (tmp_path / "turned.jpg").read_bytes()
    header = data[: len(data) // 2]
    assert native_size(header) == (90, 60)
    assert native_size(header, upright=False) == (60, 90)


@pytest.mark.parametrize("text", ["4", "4x4,", "4x4,0x8", "4x4,4x4", "4x4;2x8"])
def test_invalid_lists_of_sizes_are_quoted(text):
    with pytest.raises(ValueError, match=f"invalid sizes: got '{text}'; expected different sizes"):
        parse_buckets(text)


def settings(folder, text=TEXT, **fields):
    options = {"path": str(folder), "image_size": 4, "channels": 1, "heldout_fraction": 0.05}
    return tiny_settings(
        **{
            "model__name": "DiT-S/2",
            "model__hidden_size": 16,
            "data__name": "image_folder",
            "data__batch_size": 3,
            "data__options": options,
            "data__buckets": text,
            "training__steps": 6,
            "mesh__data": 1,
            "checkpoint__every_steps": 2,
            "logging__every_steps": 1,
            "logging__heldout_every_steps": 3,
            "sampling__steps": 2,
            "sampling__guidance_scale": 1.0,
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "4x4,2x7"}, "invalid input width 7; expected a multiple of patch_size=2"),
        ({"text": "4x4,2x8,8x2,2x32"}, "too few images for bucket 2x32: got 0, by bucket 4x4: 1[12], .*"),
        ({"data__batch_size": 9}, "too few images .*; expected at least data.batch_size=9"),
        ({"data__options": {"image_size": 4, "crop": "celeba"}}, "expected one number with crop='celeba'"),
        ({"data__name": "fake", "data__options": {"image_size": 4}}, "unsupported data source 'fake'"),
        ({"model__name": "DiS-S/2", "model__num_heads": 0, "model__depth": 2}, "unsupported size 2x8 of DiS"),
    ],
)
def test_buckets_that_cannot_be_trained_on_are_refused_in_one_line(
    folder, fields: dict[str, Any], message: str
):
    if "crop" in fields.get("data__options", {}):
        fields = {"data__options": {**fields["data__options"], "path": str(folder)}}
    with pytest.raises(ConfigError, match=f"^config.data.buckets: .*{message}"):
        _ = Components(settings(folder, **fields)).buckets


def test_an_interrupted_run_with_buckets_resumes_bit_identically(folder, tmp_path):
    compile_step, compiled = train.compile_train_step, {}

    def compile_once(components, mesh, state, distilled, shape, offset):
        if shape not in compiled:
            compiled[shape] = compile_step(components, mesh, state, distilled, shape, offset)
        return compiled[shape]

    with pytest.MonkeyPatch.context() as patch, unoptimized():
        patch.setattr(train, "compile_train_step", compile_once)
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        train.train(settings(folder), whole)
        assert (whole / "samples.png").exists()
        assert set(compiled) == {(*size, 1) for size in SIZES}
        with pytest.MonkeyPatch.context() as inner, pytest.raises(KeyboardInterrupt):
            interrupt(inner, 5)
            train.train(settings(folder), stopped)
        train.train(settings(folder), stopped)
        assert_ended_alike(stopped, whole, 6)
        with pytest.raises(ConfigError, match="trained on different data: batch_size: 3 → 2"):
            train.train(settings(folder, data__batch_size=2), whole)
