import dataclasses
import json
import os
import subprocess

import jax
import numpy as np
import pytest
from ended_runs import FIELDS, command, environment
from full_disk import full_disk
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import dig_jax
from configs import smoke
from dig_jax import CheckpointError, ConfigError, config
from dig_jax.checkpoints.reader import read_model
from dig_jax.export.export import export
from dig_jax.testing import tiny_settings, write_checkpoint


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """A parameter file that tests must not change."""
    path = tmp_path_factory.mktemp("exported") / "tiny.safetensors"
    export(tiny_settings(), workdir, path)
    return path


@pytest.fixture
def changed(exported, tmp_path):
    """Write a copy of the file with other arrays or metadata."""

    def write(arrays=None, **metadata):
        with safe_open(exported, framework="numpy") as file:
            metadata = file.metadata() | metadata
        path = tmp_path / "changed.safetensors"
        metadata = {name: text for name, text in metadata.items() if text is not None}
        save_file(load_file(exported) | (arrays or {}), path, metadata)
        return path

    return write


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", ["0.9", "0.99", "params"])
def test_the_average_that_sampling_names_is_exported_bit_for_bit(run, tmp_path, name):
    directory, trees = run
    path = tmp_path / "new" / "x.safetensors"
    export(tiny_settings(sampling__ema=name), directory, path)
    components, step, params = read_model(path)
    assert (components.config, step) == (tiny_settings(sampling__ema=name), 7)
    assert_equal(params, trees[name])
    assert {leaf.dtype for leaf in load_file(path).values()} == {np.dtype(np.float32)}
    assert [other.name for other in path.parent.iterdir()] == [path.name]


def test_the_header_describes_the_file_to_any_safetensors_reader(exported):
    with safe_open(exported, framework="numpy") as file:
        about = file.metadata()
        assert "blocks.rest.0.mixer.q_proj.kernel" in file.keys()  # noqa: SIM118
    assert (about["format"], about["step"], about["ema"]) == ("dig-jax", "7", "0.9")
    assert config.from_dict(json.loads(about["config"])) == tiny_settings()
    assert json.loads(about["versions"])["jax"] == jax.__version__


def test_file_permissions_follow_the_umask(workdir, tmp_path):
    before = os.umask(0o027)
    try:
        export(tiny_settings(), workdir, tmp_path / "x.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_file_and_its_checkpoint_load_the_same_sampler(workdir, exported):
    settings = tiny_settings(sampling__steps=2)
    ours, theirs = (dig_jax.load(path, settings=settings) for path in (str(exported), workdir))
    assert_equal(ours.params, theirs.params)
    assert {type(leaf) for leaf in jax.tree.leaves(ours.params)} == {type(jax.numpy.ones(1))}
    assert (ours.step, ours.components.config) == (theirs.step, theirs.components.config) == (7, settings)


def test_a_file_holds_one_average(exported):
    assert dig_jax.load(exported, "0.9").step == 7
    with pytest.raises(CheckpointError, match=f"unknown average '0.99' in {exported}; expected 0.9"):
        dig_jax.load(exported, "0.99")


def test_settings_of_another_model_are_rejected(workdir, exported, tmp_path):
    other = tiny_settings(model__depth=2)
    with pytest.raises(ConfigError, match="was created with different settings: model.depth: 1 → 2"):
        dig_jax.load(exported, settings=other)
    with pytest.raises(ConfigError, match="was created with different settings: model.depth: 1 → 2"):
        export(other, workdir, tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


def test_an_existing_file_is_not_overwritten(workdir, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("somebody's weights")
    with pytest.raises(ConfigError, match=f"--output={path} exists and holds something else; choose another"):
        export(tiny_settings(), workdir, path)
    assert path.read_text() == "somebody's weights"


def test_the_same_export_again_writes_nothing_and_another_one_is_refused(workdir, tmp_path, caplog):
    caplog.set_level("INFO")
    path = tmp_path / "x.safetensors"
    export(tiny_settings(), workdir, path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    export(tiny_settings(), workdir, path)
    assert f"{path} already holds step 7 (0.9)" in caplog.messages
    with pytest.raises(ConfigError, match=f"--output={path} exists and holds something else"):
        export(tiny_settings(sampling__ema="params"), workdir, path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_an_output_with_an_unknown_suffix_is_rejected(workdir, tmp_path):
    with pytest.raises(
        ConfigError,
        match="invalid --output=.*x.npz; expected a name that ends with .safetensors, .stablehlo or .onnx",
    ):
        export(tiny_settings(), workdir, tmp_path / "x.npz")


def test_a_full_disk_raises_one_line_and_leaves_no_file(workdir, tmp_path):
    with full_disk(10_000), pytest.raises(CheckpointError, match="x.safetensors could not be written: "):
        export(tiny_settings(), workdir, tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_directory_that_cannot_be_created_raises_one_line(workdir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="x.safetensors could not be written: "):
        export(tiny_settings(), workdir, tmp_path / "file" / "x.safetensors")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"more": np.zeros(3, np.float32)},
            r"1 arrays that do not match .* first is more: got float32 \[3\]; expected none",
        ),
        (
            {"final.linear.bias": np.zeros(3, np.float32)},
            r"first is final.linear.bias: got float32 \[3\]; expected float32 \[8\]",
        ),
        ({"final.linear.bias": np.zeros(8, np.float16)}, r"got float16 \[8\]; expected float32 \[8\]"),
    ],
)
def test_arrays_that_do_not_match_the_config_are_named(changed, arrays, message):
    with pytest.raises(CheckpointError, match=message):
        read_model(changed(arrays))


def test_a_missing_array_is_named(exported, tmp_path):
    arrays = load_file(exported)
    del arrays["final.linear.bias"]
    with safe_open(exported, framework="numpy") as file:
        save_file(arrays, tmp_path / "x.safetensors", file.metadata())
    with pytest.raises(CheckpointError, match=r"1 arrays .* final.linear.bias: got none; expected float32"):
        read_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"format": None},
            "not written by --mode=export: got format=None in its header; expected 'dig-jax'",
        ),
        ({"format": "pt"}, "was not written by --mode=export"),
        ({"config": None}, "has a corrupt header: KeyError: 'config'"),
        ({"config": "{"}, "has a corrupt header: JSONDecodeError: "),
        ({"config": "[" * 10**5}, "has a corrupt header: RecursionError: "),
        ({"config": "{}"}, "arrays that do not match its config"),
        (
            {"config": '{"sed": 1}'},
            "different version: unknown field config.sed; did you mean 'seed'",
        ),
        ({"step": "many"}, "has a corrupt header: ValueError: "),
        ({"ema": None}, "has a corrupt header: KeyError: 'ema'"),
        ({"images": "{"}, "has a corrupt header: JSONDecodeError: "),
        ({"images": "[]"}, "has a corrupt header: ValueError: invalid images: got "),
        (
            {"images": '{"image_shape": [4, 4], "class_names": []}'},
            "has a corrupt header: ValueError: invalid image",
        ),
    ],
)
def test_an_invalid_header_raises_one_line(changed, metadata, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_model(changed(**metadata))
    assert "\n" not in str(caught.value)


def test_a_file_without_metadata_is_rejected(exported, tmp_path):
    save_file(load_file(exported), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="x.safetensors was not written by --mode=export"):
        read_model(tmp_path / "x.safetensors")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"{tmp_path}/x.safetensors: .*no such file"):
        dig_jax.load(tmp_path / "x.safetensors")


def test_a_file_describes_its_images_without_their_source(changed):
    elsewhere = dataclasses.asdict(tiny_settings())
    elsewhere["data"] |= {"name": "nowhere"}
    components = read_model(changed(config=json.dumps(elsewhere)))[0]
    assert components.image_spec.image_shape == (4, 4, 1)
    assert components.image_spec.class_names == ("0", "1", "2", "3", "4")
    # Older versions did not write `images`.
    with pytest.raises(ConfigError, match="config.data: .*nowhere"):
        read_model(changed(config=json.dumps(elsewhere), images=None))


def test_export_from_the_command_line(tmp_path):
    c = smoke.get_config()
    c.update_from_flattened_dict(FIELDS)
    trees = write_checkpoint(tmp_path / "run", config.from_dict(c.to_dict()), step=5)
    output = tmp_path / "x.safetensors"
    arguments = command("smoke", tmp_path / "run", FIELDS, "--mode=export", f"--output={output}")
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].endswith(f"arrays) to {output}")
    assert_equal(read_model(output)[2], trees["0.9"])
