"""python -m dig_jax.convert converts upstream's and diffusers' files to ours and back."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch_files as made
from flax import nnx, traverse_util
from full_disk import full_disk
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_convert import CASES
from upstream_files import HEADS, abstract, assert_same, assert_upstreams, expected, refused, run, state_dict

import dig_jax
from configs import base
from dig_jax import config
from dig_jax.checkpoints.reader import read_model
from dig_jax.convert import command as convert
from dig_jax.convert.flow import time_input
from dig_jax.convert.names import torch_arrays
from dig_jax.convert.recognize import (
    describe,
    looks_like_official_dit,
    recognize,
)
from dig_jax.convert.sources import UpstreamParams
from dig_jax.data import ImageSpec
from dig_jax.files.pytorch.reader import open_torch
from dig_jax.files.pytorch.writer import write_torch
from dig_jax.files.safetensors import StoredArray


def write_released(folder, case, **arguments):
    """Write a file as upstream's trainer does."""
    arrays = state_dict(case)
    content = made.tree(
        model=made.tree(),
        ema=made.tree(**{name: entry(x, i) for i, (name, x) in enumerate(arrays.items())}),
        opt=made.tree(state=made.tree(), param_groups=b"]"),
        args=made.namespace(**arguments),
    )
    storages = {f"s{i}": x.tobytes() for i, x in enumerate(arrays.values())}
    return made.write(folder / "0400000.pt", made.pickled(content), **storages)


@pytest.fixture
def released(tmp_path):
    """Write a file as upstream's trainer does to tmp_path."""
    return functools.partial(write_released, tmp_path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Return our file of a case; every case is converted once."""

    @functools.cache
    def convert_once(case):
        folder = tmp_path_factory.mktemp(case)
        run(write_released(folder, case), folder / "ours.safetensors", *HEADS.get(case, []))
        return folder / "ours.safetensors"

    return convert_once


def entry(array, index):
    strides = [stride // 4 for stride in array.strides]
    return made.tensor(key=str(index), numel=array.size, shape=array.shape, strides=strides)


@pytest.mark.parametrize("case", ["dig_plain", "dig_skip", "dit"])
def test_a_file_of_upstream_converts_to_ours_and_back_bit_for_bit(converted, tmp_path, case):
    ours, theirs = converted(case), tmp_path / "theirs.pt"
    components, step, params = read_model(ours)
    settings = components.config
    assert_same(params, expected(case))
    assert (step, settings.sampled_ema) == (0, "0.9999")
    assert settings.model.skip_alignment == ("upstream" if case == "dig_skip" else "raster")
    run(ours, theirs)
    with open_torch(theirs) as file:
        assert_upstreams({name: file.read(x) for name, x in file.tensors().items()}, case)


def test_our_parameters_survive_upstreams_names_bit_for_bit(converted, tmp_path):
    for name in ("theirs.pt", "theirs.safetensors"):
        run(converted("dit"), tmp_path / name)
        run(tmp_path / name, tmp_path / f"again.{name}.safetensors", "--num_heads=1")
        assert_same(dig_jax.load(tmp_path / f"again.{name}.safetensors").params, expected("dit"))
    assert_upstreams(load_file(tmp_path / "theirs.safetensors"), "dit")


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"dig_plain", "dig_skip", "dit"}))
def test_parameters_with_other_options_come_back_bit_for_bit(case):
    assert_upstreams(torch_arrays(abstract(case), traverse_util.flatten_dict(expected(case))), case)


def test_a_model_returns_its_state_dict():
    model = nnx.merge(nnx.split(abstract("dit"))[0], expected("dit"))
    assert_upstreams(dig_jax.convert.to_torch_state_dict(model), "dit")


def test_a_converted_workdir_can_be_sampled_from_and_converted_back(released, tmp_path):
    run(released("dig_plain"), tmp_path / "run")
    assert_same(dig_jax.load(tmp_path / "run").params, expected("dig_plain"))
    run(tmp_path / "run", tmp_path / "back.pt", "--tree=params")
    run(tmp_path / "back.pt", tmp_path / "ours.safetensors")
    components, _, params = read_model(tmp_path / "ours.safetensors")
    assert_same(params, expected("dig_plain"))
    assert (
        components.config.sampled_ema == "params"
    )  # a file without trees does not say that it is an average


@pytest.fixture
def dit_xl():
    """Names and shapes of DiT-XL/2 at 256 px, as far as they matter."""
    shapes = {
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "final_layer.linear.weight": (32, 1152),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "pos_embed": (1, 256, 1152),
        **{f"blocks.{block}.attn.qkv.weight": (3456, 1152) for block in range(28)},
    }
    return UpstreamParams(
        {name: StoredArray(shape, "float32", np.zeros) for name, shape in shapes.items()}, "", {}
    )


def test_the_model_is_inferred_from_the_shapes(dit_xl):
    settings = recognize(dit_xl)
    assert (settings.model.name, settings.model.depth, settings.model.num_heads) == ("DiT-XL/2", 28, 16)
    assert settings.data.options == {"image_size": 32, "channels": 4, "num_classes": 1000}
    assert settings.model.learn_sigma
    named = recognize(dit_xl, model="SiT-XL/2", input_size=64)
    assert (named.model.name, named.model.depth) == ("DiT-XL/2", None)
    assert named.data.options["image_size"] == 64
    assert named.model.num_heads is None
    assert recognize(dit_xl, model="DiT-XL/2", num_heads=8).model.num_heads == 8


@pytest.mark.parametrize("target", ["ours.safetensors", "run"])
def test_a_converted_latent_model_has_its_autoencoder_and_imagenets_classes(tmp_path, target):
    table = {"y_embedder.embedding_table.weight": np.zeros((1001, 32), np.float32)}
    save_file(state_dict("dit") | table, tmp_path / "theirs.safetensors")
    run(tmp_path / "theirs.safetensors", tmp_path / target, "--num_heads=1")
    sampler = dig_jax.load(tmp_path / target)
    assert sampler.components.config.autoencoder.path == "stabilityai/sd-vae-ft-ema"
    assert sampler.components.image_spec.image_shape == (8, 8, 4)
    assert sampler.components.image_spec.class_names[207] == "n02099601"
    assert sampler.resolve("golden retriever", None)[0].tolist() == [207]


def test_an_unconditional_pixel_model_converts_both_ways(tmp_path):
    save_file(state_dict("dig_unconditional_rgb"), tmp_path / "theirs.safetensors")
    run(tmp_path / "theirs.safetensors", tmp_path / "run")
    sampler = dig_jax.load(tmp_path / "run")
    assert_same(sampler.params, expected("dig_unconditional_rgb"))
    assert sampler.components.image_spec == ImageSpec((8, 8, 3), ())
    assert sampler.components.config.autoencoder.path is None
    run(tmp_path / "run", tmp_path / "back.safetensors")
    assert_upstreams(load_file(tmp_path / "back.safetensors"), "dig_unconditional_rgb")


def test_the_published_dit_is_recognized_by_its_shapes(dit_xl):
    """The warning about its license depends on it; the same model trained by somebody else has none."""
    assert looks_like_official_dit(dit_xl, recognize(dit_xl))
    assert looks_like_official_dit(dit_xl, recognize(dit_xl, model="DiT-XL/2"))
    own = dataclasses.replace(dit_xl, hints={"model": "DiT-XL/2"})
    assert not looks_like_official_dit(own, recognize(own))
    shallow = UpstreamParams(dict(list(dit_xl.stored.items())[:-1]), "", {})
    assert not looks_like_official_dit(shallow, recognize(shallow))


@pytest.mark.parametrize("shape", [(1152, 4, 0, 0), (0, 4, 2, 2), (1152, 4), ()])
def test_impossible_shapes_are_errors(dit_xl, shape):
    dit_xl.stored["x_embedder.proj.weight"] = StoredArray(shape, "float32", np.zeros)
    with pytest.raises(dig_jax.CheckpointError, match="invalid shape of x_embedder.proj.weight"):
        recognize(dit_xl)


def test_flow_matching_is_recognized_by_names_and_by_what_only_repa_has(dit_xl):
    assert time_input(dit_xl, "SiT-XL-2-256x256.pt") == time_input(dit_xl, "SiT-XL/2") == "data"
    assert time_input(dataclasses.replace(dit_xl, hints={"model": "SiT-XL/2"}), "0400000.pt") == "data"
    assert time_input(dataclasses.replace(dit_xl, has_projectors=True), "SiT-XL/2") == "noise"
    assert time_input(dit_xl, "0400000.pt") is None


def damaged(tmp_path, change):
    arrays = state_dict("dit")
    change(arrays)
    write_torch(tmp_path / "x.pt", arrays)
    return tmp_path / "x.pt"


QKV = "blocks.1.attn.qkv.weight"
DAMAGES = {
    "missing": (lambda arrays: arrays.pop(QKV), f"missing: {QKV}"),
    "unexpected": (lambda arrays: arrays.update(more=np.zeros(3)), "unexpected: more"),
    "another_shape": (
        lambda arrays: arrays.update({QKV: np.zeros((32, 96))}),
        f"wrong shape: {QKV} (32, 96), expected (96, 32)",
    ),
    "nan": (lambda arrays: arrays[QKV].fill(np.nan), f"{QKV} has non-finite values"),
    "infinity": (lambda arrays: arrays[QKV].fill(np.inf), f"{QKV} has non-finite values"),
    "positions": (
        lambda arrays: arrays["pos_embed"].fill(0.5),
        "invalid pos_embed of shape (1, 16, 32)",
    ),
    "positions_of_another_width": (
        lambda arrays: arrays.update(pos_embed=np.zeros((1, 2**16, 1))),
        "invalid pos_embed of shape (1, 65536, 1)",
    ),
    "block_missing": (
        lambda arrays: [arrays.pop(name) for name in list(arrays) if name.startswith("blocks.2.")],
        "missing block 2; expected consecutive blocks from 0",
    ),
    "thousands_of_blocks": (
        lambda arrays: arrays.update({"blocks.9999.mlp.fc1.bias": np.zeros(64)}),
        "missing block 4; expected consecutive blocks from 0",
    ),
    "no_patches": (
        lambda arrays: arrays.pop("x_embedder.proj.weight"),
        "missing parameter: x_embedder.proj.weight",
    ),
    "flat_patches": (
        lambda arrays: arrays.update({"x_embedder.proj.weight": np.zeros((32, 16))}),
        "invalid shape of x_embedder.proj.weight: got (32, 16); expected 4 nonzero dimensions",
    ),
    "other_names": (lambda arrays: arrays.clear(), "unknown parameter names: got no arrays"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_arrays_that_are_no_model_give_one_line_and_write_nothing(tmp_path, damage):
    change, message = DAMAGES[damage]
    source = damaged(tmp_path, change)
    line = refused(source, tmp_path / "x.safetensors", "--num_heads=1", status=1)
    assert f"{source}: " in line
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_float16_and_bfloat16_convert_exactly_and_other_dtypes_are_errors(tmp_path):
    for dtype in (np.float16, jnp.bfloat16):
        arrays = {name: array.astype(dtype) for name, array in state_dict("dit").items()}
        save_file(arrays, tmp_path / "x.safetensors")
        run(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--num_heads=1")
        value = read_model(tmp_path / "y.safetensors")[2]["final"]["linear"]["bias"]
        np.testing.assert_array_equal(value, arrays["final_layer.linear.bias"].astype(np.float32))
        (tmp_path / "y.safetensors").unlink()
    arrays["final_layer.linear.bias"] = np.zeros(32, np.int64)
    save_file(arrays, tmp_path / "x.safetensors")
    line = refused(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--num_heads=1", status=1)
    assert "unsupported dtype: final_layer.linear.bias int64" in line


def test_a_hostile_file_executes_and_writes_nothing(tmp_path):
    call = b"cos\nmkdir\n" + made.text(str(tmp_path / "executed")) + b"\x85R"
    source = made.write(tmp_path / "x.pt", made.pickled(made.tree(ema=made.tree(w=call))))
    assert "invalid ema.w: got os.mkdir" in refused(source, tmp_path / "y.safetensors", status=1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_invalid_commands_give_one_line(released, converted, tmp_path):
    source, target = released("dit"), tmp_path / "x.safetensors"
    assert "missing --num_heads" in refused(source, target, status=2)
    assert "--model=DiG-XL/2 does not match the parameters: got parameter names of DiT" in refused(
        source, target, "--model=DiG-XL/2", status=2
    )
    assert "unknown tree 'emma'; expected one of: ema" in refused(source, target, "--tree=emma", status=1)
    assert "expected FILE.safetensors or a new workdir" in refused(source, tmp_path / "x.pt", status=2)
    assert "no such file" in refused(tmp_path / "none.pt", target, status=1)
    assert "no weights; expected diffusion_pytorch_model.safetensors" in refused(tmp_path, target, status=1)
    assert "the following arguments are required: target" in refused(source, status=2)
    assert "--num_heds=3; see --help" in refused(source, target, "--num_heds=3", status=2)
    line = refused(converted("dit"), tmp_path / "x.npz", status=2)
    assert "expected FILE.safetensors, FILE.pt or a new folder for diffusers" in line
    target.write_text("somebody's weights")
    line = refused(source, target, "--num_heads=1", status=2)
    assert "exists and holds something else; choose another name" in line
    assert target.read_text() == "somebody's weights"


@pytest.mark.parametrize("name", ["ours.safetensors", "workdir"])
def test_the_same_conversion_again_writes_nothing_and_another_one_is_refused(released, tmp_path, name, capfd):
    source, target = released("dit"), tmp_path / name
    run(source, target, "--num_heads=1")
    before = written(tmp_path)
    run(source, target, "--num_heads=1")
    assert f"{target} already holds this; nothing was written" in capfd.readouterr().err
    assert "exists and holds something else" in refused(source, target, "--num_heads=2", status=2)
    assert written(tmp_path) == before


@pytest.mark.parametrize("name", ["theirs.safetensors", "theirs.pt", "transformer"])
def test_the_same_conversion_back_writes_nothing_and_another_one_is_refused(converted, tmp_path, name, capfd):
    target = tmp_path / name
    run(converted("dit"), target)
    before = written(tmp_path)
    run(converted("dit"), target)
    assert f"{target} already holds this; nothing was written" in capfd.readouterr().err
    other = load_file(converted("dit"))
    first = next(iter(other))
    with safe_open(converted("dit"), "np") as file:
        save_file(other | {first: other[first] + 1}, tmp_path / "changed.safetensors", file.metadata())
    assert "holds something else" in refused(tmp_path / "changed.safetensors", target, status=2)
    (tmp_path / "changed.safetensors").unlink()
    assert written(tmp_path) == before


def written(folder):
    """Return the time of every file below a folder."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_gives_one_line_and_leaves_nothing(released, converted, tmp_path):
    source = released("dit")
    with full_disk(10_000):
        line = refused(source, tmp_path / "new" / "x.safetensors", "--num_heads=1", status=1)
    assert "x.safetensors could not be written" in line
    for name in ("x.pt", "transformer"):
        with full_disk(10_000):
            line = refused(converted("dit"), tmp_path / "new" / name, status=1)
        assert f"{name} could not be written" in line
    assert not any((tmp_path / "new").iterdir())


def test_a_workdir_is_written_atomically(released, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_json", full)
    line = refused(released("dit"), tmp_path / "new" / "run", "--num_heads=1", status=1)
    assert "run could not be written: " in line
    assert not any((tmp_path / "new").iterdir())


def test_a_converted_file_describes_itself(released, converted):
    path = converted("dig_plain")
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
    assert (about["format"], about["step"], about["ema"]) == ("dig-jax", "0", "0.9999")
    assert path.stat().st_mode & 0o777 == released("dit").stat().st_mode & 0o777


def test_the_config_of_a_converted_file_is_the_published_recipe():
    c = base.get_config()
    c.data.name, c.data.options = "fake", {"image_size": 32, "channels": 4, "num_classes": 1000}
    c.autoencoder.path = "stabilityai/sd-vae-ft-ema"
    c.sampling.ema = "0.9999"
    expected = config.from_dict(c.to_dict())
    assert describe(dataclasses.asdict(expected.model), expected.data.options, "0.9999") == expected
