import json
import logging
import shutil

import jax
import numpy as np
import pytest
from encoded_images import CLASSES, assert_holds, changed_autoencoder, fields, settings, tree
from flax import nnx

from dig_jax import autoencoder, config
from dig_jax.autoencoder.model import encode_images
from dig_jax.data import load_source
from dig_jax.data.latents import check_latents
from dig_jax.encoding.encode import encode
from dig_jax.errors import ConfigError, UserError
from dig_jax.parallel import batch_sharding, local_mesh, replicated


@pytest.mark.parametrize("dtype, atol", [("float32", 1e-4), ("float16", 2e-2)])
def test_a_cache_holds_the_moments_of_every_image_and_of_its_mirror_image(made, tmp_path, dtype, atol):
    index = encode(settings(made, tmp_path, encode__dtype=dtype))
    assert_holds(tmp_path, made, atol)
    stored = json.loads((tmp_path / "index.json").read_text())
    assert stored == index
    assert stored["class_names"] == list(CLASSES)
    assert stored["latents"]["shape"] == [8, 8, 4]
    assert stored["latents"]["dtype"] == dtype
    assert stored["pictures"]["size"] == [16, 16]
    assert stored["pictures"]["crop"] == "adm"
    assert stored["autoencoder"]["fingerprint"] == autoencoder.load(made / "autoencoder").fingerprint()
    shards = stored["splits"]["train"] + stored["splits"]["heldout"]
    unreadable = {name for shard in shards for name in shard["unreadable"]}
    assert unreadable == {str(made / "pictures" / name / "3.png") for name in CLASSES}


def test_the_index_has_mean_and_deviation_of_samples_from_the_posteriors(complete):
    path, index = complete
    source = load_source("latents", "train", path=str(path))
    both = [source.posterior(index, mirrored) for index in range(len(source)) for mirrored in (False, True)]
    mean, logvar = (np.stack([one[part] for one in both]).astype(float) for part in (1, 2))
    expected = mean.mean((0, 1, 2))
    np.testing.assert_allclose(index["latents"]["mean"], expected, rtol=1e-9)
    variance = (mean**2 + np.exp(logvar)).mean((0, 1, 2)) - expected**2
    np.testing.assert_allclose(index["latents"]["deviation"], np.sqrt(variance), rtol=1e-9)


def test_without_held_out_images_that_split_is_empty(made, tmp_path):
    options = settings(made, "").encode.options | {"heldout_fraction": 0.0}
    encode(settings(made, tmp_path, encode__options=options))
    assert len(load_source("latents", "train", path=str(tmp_path))) == 14
    assert len(load_source("latents", "heldout", path=str(tmp_path))) == 0


def test_files_without_a_readable_image_are_skipped(made, tmp_path):
    index = encode(settings(made, tmp_path, encode__shard_size=1))
    assert sorted(shard["images"] for shard in index["splits"]["train"])[:3] == [0, 0, 1]
    assert_holds(tmp_path, made, 1e-4)


def test_images_without_files_are_encoded_too(made, tmp_path):
    options = {"image_size": 16, "length": 6, "num_classes": 2}
    encode(settings(made, tmp_path, encode__name="fake", encode__options=options))
    source, expected = (
        load_source("latents", "train", path=str(tmp_path)),
        load_source("fake", "train", **options),
    )
    model = autoencoder.load(made / "autoencoder")
    for index in range(6):
        computed = model.mean(model.encode(expected[index]["image"][None]))[0]
        np.testing.assert_allclose(source[index]["image"], computed, atol=1e-4)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"5"])
def test_a_description_that_is_not_json_of_ours_is_written_again(made, complete, copy, content):
    (copy / "index.json").unlink()
    (copy / "train" / "00001.json").write_bytes(content)
    encode(settings(made, copy))
    assert tree(copy) == tree(complete[0])


@pytest.mark.parametrize(
    "field, value",
    [("unreadable", 5), ("sums", ["a"]), ("squares", [1.0, None]), ("images", 2.0), ("file", None)],
)
def test_a_description_with_other_types_is_written_again(made, complete, copy, field, value):
    (copy / "index.json").unlink()
    path = copy / "train" / "00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    encode(settings(made, copy))
    assert tree(copy) == tree(complete[0])


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[]", b"{"])
def test_an_unreadable_header_is_one_line(made, copy, content):
    (copy / "encoding.json").write_bytes(content)
    with pytest.raises(
        UserError, match="cannot read .*encoding.json: .*; use a new config.data.options.path"
    ):
        encode(settings(made, copy))


def test_latents_may_have_any_shape(made, tmp_path):
    options = {"path": str(made / "pictures"), "image_size": (16, 12), "heldout_fraction": 0.25}
    for size in ((8, 6), [8, 6], -1):
        data = {"path": str(tmp_path / "cache"), "image_size": size}
        wanted = settings(made, "", encode__options=options, data__options=data)
        assert encode(wanted)["latents"]["shape"] == [8, 6, 4]
        source = load_source("latents", "train", **wanted.data.options)
        assert source[0]["image"].shape == (8, 6, 4)
        check_latents(source, wanted, None)
    data["image_size"] = 8
    with pytest.raises(ConfigError, match=r"invalid config.data.options.image_size=8; expected \(8, 6\)"):
        encode(settings(made, "", encode__options=options, data__options=data))
    with pytest.raises(UserError, match="have image_size=8×6; expected config.data.options.image_size=8×8"):
        load_source("latents", "train", **data)


def test_images_that_are_all_unreadable_are_not_a_cache(tmp_path, made):
    for number in range(4):
        path = tmp_path / "pictures" / "cat" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"nothing")
    options = {"path": str(tmp_path / "pictures"), "image_size": 16}
    wanted = settings(made, tmp_path / "cache", encode__options=options)
    for _ in range(2):
        with pytest.raises(UserError, match="no image to train on: all 3 images are unreadable"):
            encode(wanted)
    assert not (tmp_path / "cache" / "index.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"path": 5}, "invalid config.data.options.path=5; expected text"),
        ({"path": "x", "image_size": "8"}, "invalid config.data.options.image_size='8'; expected an integer"),
        ({"path": "x", "size": 8}, "config.data: unknown option 'size' of data source 'latents'"),
        ({"path": "\udce9"}, "invalid config.data.options.path: got .*; expected a name in UTF-8"),
    ],
)
def test_options_of_the_latents_are_checked(made, options, message):
    with pytest.raises(ConfigError, match=message):
        encode(settings(made, "", data__options=options))


def test_a_complete_cache_is_verified_and_corrupt_files_are_rewritten(made, complete, copy, caplog):
    caplog.set_level(logging.INFO)
    expected, config_ = tree(complete[0]), settings(made, copy)
    times = {name: (copy / name).stat().st_mtime_ns for name in expected if name.endswith("record")}
    encode(config_)
    assert "12 images of 2 classes (ant, bee), 4 held out; 16 × 16, 3 channels" in caplog.messages
    assert "corrupt" not in caplog.text
    file = copy / "train" / "00001.array_record"
    content = bytearray(file.read_bytes())
    content[3000] ^= 1
    file.write_bytes(content)
    (copy / "index.json").write_bytes(b"{")
    encode(config_)
    assert tree(copy) == expected
    assert f"rewriting corrupt file {file}" in caplog.text
    assert caplog.text.count("corrupt") == 1
    changed = [name for name in times if (copy / name).stat().st_mtime_ns != times[name]]
    assert changed == ["train/00001.array_record"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encode__dtype": "float16"}, "latents.dtype: float32 → float16"),
        ({"encode__shard_size": 4}, "shard_size: 5 → 4"),
        ({"autoencoder__dtype": "bfloat16"}, "autoencoder.dtype: float32 → bfloat16"),
        ({"size": 32}, "latents.shape: .8, 8, 4. → .16, 16, 4."),
        ({"crop": "celeba"}, "pictures.crop: adm → celeba"),
        ({"heldout_fraction": 0.1}, "pictures.fingerprints.heldout: "),
        ({"weights": 2.0}, "autoencoder.fingerprint: "),
    ],
)
def test_a_cache_of_different_settings_is_rejected_and_not_changed(made, copy, tmp_path, changes, message):
    before = tree(copy)
    wanted = fields(made, copy, **{name: value for name, value in changes.items() if "__" in name})
    options = wanted["encode"]["options"]
    options |= {name: value for name, value in changes.items() if name in ("crop", "heldout_fraction")}
    options["image_size"] = changes.get("size", 16)
    if "weights" in changes:
        wanted["autoencoder"]["path"] = str(changed_autoencoder(made, tmp_path, changes["weights"]))
    for finished in (True, False):
        if not finished:
            (copy / "index.json").unlink()
            del before["index.json"]
        with pytest.raises(ConfigError, match=message) as caught:
            encode(config.from_dict(wanted))
        assert "were created with different settings: " in str(caught.value)
        assert "\n" not in str(caught.value)
        assert tree(copy) == before


def test_an_autoencoder_may_move(made, copy, tmp_path):
    folder = shutil.copytree(made / "autoencoder", tmp_path / "moved")
    index = encode(settings(made, copy, autoencoder__path=str(folder)))
    assert index["autoencoder"]["path"] == str(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data__name": "fake"}, "invalid config.data.name='fake' .* for --mode=encode; expected 'latents'"),
        ({"data__options": {}}, "config.data.options.path='' for --mode=encode; expected 'latents'"),
        ({"autoencoder__path": ""}, "missing config.autoencoder.path"),
        (
            {"autoencoder__path": "/nowhere"},
            "config.autoencoder.path: invalid autoencoder '/nowhere'",
        ),
        ({"encode__name": ""}, "missing config.encode.name"),
        (
            {"encode__name": "imagefolder"},
            "config.encode: unknown data source 'imagefolder'; .* did you mean 'image_folder'",
        ),
        ({"encode__options": {"path": "/nowhere"}}, "config.encode: no such directory: '/nowhere'"),
        (
            {"encode__name": "fake", "encode__options": {"image_size": 9}},
            "9×9 pixels and 3 channels; expected multiples of 2 pixels and 3 channels",
        ),
        ({"encode__name": "digits", "encode__options": {}}, "invalid images of 8×8 pixels and 1 channels"),
    ],
)
def test_invalid_settings_are_named_before_anything_is_written(made, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        encode(settings(made, tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option, value", [("image_size", 16), ("channels", 8), ("num_classes", 1000)])
def test_latents_that_the_config_would_not_train_on_are_rejected(made, tmp_path, option, value):
    options = {"path": str(tmp_path / "new"), option: value}
    with pytest.raises(ConfigError, match=rf"invalid config.data.options.{option}={value}; expected \d"):
        encode(settings(made, "", data__options=options))
    assert not (tmp_path / "new").exists()


def test_a_directory_with_other_files_is_not_written_to(made):
    before = tree(made)
    with pytest.raises(UserError, match="contains other files; expected a new directory"):
        encode(settings(made, made / "pictures"))
    assert tree(made) == before


def test_a_directory_that_is_not_writable_is_reported_in_one_line(made, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="invalid directory .*file/cache: it is a file or in a file"):
        encode(settings(made, tmp_path / "file" / "cache"))


def test_non_finite_moments_are_not_stored(made, tmp_path):
    folder = changed_autoencoder(made, tmp_path, 1e6)
    wanted = settings(made, tmp_path / "cache", autoencoder__path=str(folder), encode__dtype="float16")
    with pytest.raises(UserError, match="non-finite moments in float16 for images 0 to 4 of split 'train'"):
        encode(wanted)


def test_devices_share_a_batch_without_communication(made):
    mesh = local_mesh()
    assert mesh.size == 4
    graphdef, state = nnx.split(autoencoder.load(made / "autoencoder"))
    images = jax.device_put(np.zeros((8, 16, 16, 3), np.uint8), batch_sharding(mesh))
    compiled = encode_images.lower(graphdef, jax.device_put(state, replicated(mesh)), images).compile()
    assert compiled.output_shardings.is_equivalent_to(batch_sharding(mesh), 4)
    program = compiled.as_text()
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert collective not in program
