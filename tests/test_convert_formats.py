"""The converter and the autoencoder take the files that people have, or say in one line what to do."""

import gzip
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch_files as made
from safetensors.numpy import load_file, save_file
from test_convert_diffusers import diffusers
from tiny_autoencoder import write_autoencoder
from upstream_files import assert_same, expected, refused, run, state_dict

import dig_jax
from dig_jax import CheckpointError, autoencoder
from dig_jax.checkpoints.reader import read_model
from dig_jax.convert import command
from dig_jax.files.pytorch.writer import write_torch
from dig_jax.models.embeddings import sincos_positions

STEM = "diffusion_pytorch_model"
LABELS = "y_embedder.embedding_table.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2700000000\n"


def converted(source, *options):
    """Convert a file of the golden DiT; return the sampler."""
    target = source.with_name(f"{source.name}.ours.safetensors")
    run(source, target, "--num_heads=1", *options)
    return dig_jax.load(target)


def prefixed(prefix, arrays=None):
    return {f"{prefix}{name}": array for name, array in (arrays or state_dict("dit")).items()}


def nested(arrays, first=0):
    """The pickle of a state dict, and its storages."""
    entries = {
        name: made.tensor(
            key=str(first + i), numel=x.size, shape=x.shape, strides=[stride // 4 for stride in x.strides]
        )
        for i, (name, x) in enumerate(arrays.items())
    }
    return made.tree(**entries), {f"s{first + i}": x.tobytes() for i, x in enumerate(arrays.values())}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "ema_model.", "_orig_mod.module.", "net.denoiser."]
)
@pytest.mark.parametrize("write", [save_file, lambda arrays, path: write_torch(path, arrays)])
def test_prefixes_of_wrappers_are_dropped_and_told(tmp_path, capsys, prefix, write):
    write(prefixed(prefix), tmp_path / "x.bin")
    assert_same(converted(tmp_path / "x.bin").params, expected("dit"))
    assert f"of tree {prefix[:-1]!r}" in capsys.readouterr().err


def test_a_model_deep_in_a_training_checkpoint_is_found(tmp_path, capsys):
    model, storages = nested(prefixed("model.") | {"loss.scale": np.ones(3, np.float32)})
    content = made.tree(
        state_dict=model,
        epoch=made.number(3),
        optimizer_states=b"](" + made.tree(state=made.tree()) + b"e",
        hyper_parameters=made.namespace(name="run"),
    )
    made.write(tmp_path / "x.ckpt", made.pickled(content), **storages)
    assert_same(converted(tmp_path / "x.ckpt").params, expected("dit"))
    log = capsys.readouterr().err
    assert "of tree 'state_dict.model'" in log
    assert "ignored 1 arrays outside state_dict.model, such as state_dict.loss.scale" in log


def test_the_tree_chooses_among_several_models_in_any_format(tmp_path):
    other = {name: array + 1 for name, array in state_dict("dit").items()} | {
        "pos_embed": state_dict("dit")["pos_embed"]
    }
    arrays = prefixed("ema_model.") | prefixed("online_model.", other)
    save_file(arrays, tmp_path / "x.safetensors")
    line = refused(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--num_heads=1", status=2)
    assert "holds several models; expected --tree with one of: ema_model, online_model" in line
    sampler = converted(tmp_path / "x.safetensors", "--tree=ema_model")
    assert_same(sampler.params, expected("dit"))
    assert sampler.components.config.sampled_ema == "0.9999"
    write_torch(tmp_path / "x.pt", arrays)
    sampler = converted(tmp_path / "x.pt", "--tree=online_model")
    np.testing.assert_array_equal(sampler.params["final"]["linear"]["bias"], other["final_layer.linear.bias"])
    assert sampler.components.config.sampled_ema == "params"
    line = refused(tmp_path / "x.pt", tmp_path / "y.safetensors", "--tree=emma", status=1)
    assert "unknown tree 'emma'; expected one of: ema_model, online_model" in line


def without_null_class():
    return {name: x[:-1] if name == LABELS else x for name, x in state_dict("dit").items()}


def assert_null_class_added(sampler):
    table, rows = sampler.params["label_embed"]["table"]["embedding"], state_dict("dit")[LABELS][:-1]
    assert sampler.components.image_spec.num_classes == 10
    np.testing.assert_array_equal(table[:-1], rows)
    np.testing.assert_allclose(table[-1], rows.mean(axis=0), rtol=1e-5)
    assert sampler.components.config.sampling.guidance_scale == 1


def test_a_table_without_a_null_class_keeps_all_classes(tmp_path, capsys):
    save_file(without_null_class(), tmp_path / "x.safetensors")
    sampler = converted(tmp_path / "x.safetensors")
    assert sampler.components.image_spec.num_classes == 9
    assert (
        "the last of the 10 rows of the label table is taken for the null class; if it is a class, use"
        in (capsys.readouterr().err)
    )
    (tmp_path / "x.safetensors.ours.safetensors").unlink()
    assert_null_class_added(converted(tmp_path / "x.safetensors", "--num_classes=10"))
    assert "added the mean of the 10 classes as one; guidance is off" in capsys.readouterr().err


def test_the_saved_arguments_tell_whether_there_is_a_null_class(tmp_path):
    weights, storages = nested(without_null_class())
    arguments = b"cargparse\nNamespace\n)\x81}" + made.text("num_classes") + made.number(10) + b"sb"
    content = made.tree(model=weights, args=arguments)
    made.write(tmp_path / "x.pt", made.pickled(content), **storages)
    assert_null_class_added(converted(tmp_path / "x.pt"))


def test_networks_that_only_training_needs_are_dropped_with_a_line(tmp_path, capsys):
    extra = {f"projectors.0.{i}.weight": np.ones((3, 3), np.float32) for i in (0, 2)}
    save_file(state_dict("dit") | extra, tmp_path / "x.safetensors")
    assert_same(converted(tmp_path / "x.safetensors").params, expected("dit"))
    assert (
        "dropped 2 arrays that only training needs, such as projectors.0.0.weight" in capsys.readouterr().err
    )


def test_float64_is_rounded_to_float32_with_a_line(tmp_path, capsys):
    arrays = {name: array.astype(np.float64) for name, array in state_dict("dit").items()}
    save_file(arrays, tmp_path / "x.safetensors")
    assert_same(converted(tmp_path / "x.safetensors").params, expected("dit"))
    assert f"rounded {len(arrays)} float64 arrays to float32" in capsys.readouterr().err
    arrays["final_layer.linear.bias"][0] = 1e300
    save_file(arrays, tmp_path / "x.safetensors")
    line = refused(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--num_heads=1", status=1)
    assert "final_layer.linear.bias has non-finite values" in line


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [[], ["--input_size=4x16"]])
def test_an_input_that_is_not_square_is_inferred_from_the_positions_or_given(tmp_path, options, dtype):
    size = (4, 16) if options else (4, 12)
    table = sincos_positions((size[0] // 2, size[1] // 2), 32)[None].astype(dtype)
    save_file(state_dict("dit") | {"pos_embed": table}, tmp_path / "x.safetensors")
    spec = converted(tmp_path / "x.safetensors", *options).components.image_spec
    assert spec.image_shape == (*size, 4)


@pytest.mark.parametrize("size", ["x8", "8x", "8x8x8", "eight", "-8"])
def test_an_invalid_input_size_gives_one_line(tmp_path, size):
    save_file(state_dict("dit"), tmp_path / "x.safetensors")
    line = refused(tmp_path / "x.safetensors", tmp_path / "y.safetensors", f"--input_size={size}", status=2)
    assert f"invalid size {size!r}; expected a number or HEIGHTxWIDTH" in line


@pytest.mark.parametrize("case", ["dit", "dig_plain"])
def test_the_width_of_the_mlp_is_inferred(tmp_path, case):
    arrays = state_dict(case)
    for name, array in arrays.items():
        if ".mlp.fc1" in name:
            arrays[name] = array[:96].copy()
        elif name.endswith((".mlp.fc2.weight", ".mlp.down_proj.weight")):
            arrays[name] = array[:, :96].copy()
        elif ".mlp.gate_proj" in name:
            arrays[name] = np.concatenate([half[:96] for half in np.split(array, 2)])
    save_file(arrays, tmp_path / "x.safetensors")
    run(tmp_path / "x.safetensors", tmp_path / "y.safetensors", *["--num_heads=1"] * (case == "dit"))
    assert read_model(tmp_path / "y.safetensors")[0].config.model.mlp_hidden_size == 96
    run(tmp_path / "y.safetensors", tmp_path / "back.safetensors")
    for name, array in load_file(tmp_path / "back.safetensors").items():
        if name != "pos_embed":
            np.testing.assert_array_equal(array, arrays[name])


def write_folder(folder, names, *, index=None):
    """Write the golden DiT as diffusers does, divided over files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 1, "sample_size": 8}))
    arrays = diffusers(state_dict("dit"))
    for number, name in enumerate(names):
        part = dict(list(arrays.items())[number :: len(names)])
        if name.endswith(".bin"):
            write_torch(folder / name, part)
        else:
            save_file(part, folder / name)
    if index:
        files = {name: names[number % len(names)] for number, name in enumerate(arrays)}
        (folder / index).write_text(json.dumps({"weight_map": files}))


FOLDERS = {
    "fp16": ([f"{STEM}.fp16.safetensors"], None),
    "bin": ([f"{STEM}.bin"], None),
    "fp16 bin": ([f"{STEM}.fp16.bin"], None),
    "shards": (
        [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)],
        f"{STEM}.safetensors.index.json",
    ),
    "shards of bin": ([f"{STEM}-0000{i}-of-00002.bin" for i in (1, 2)], f"{STEM}.bin.index.json"),
    "shards of fp16": (
        [f"{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)],
        f"{STEM}.safetensors.index.fp16.json",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("root", ["model", "pipeline"])
def test_every_layout_of_a_diffusers_folder_is_read(tmp_path, capsys, kind, root):
    names, index = FOLDERS[kind]
    folder = tmp_path / "x" / "transformer" if root == "pipeline" else tmp_path / "x"
    write_folder(folder, names, index=index)
    if root == "pipeline":
        (tmp_path / "x" / "model_index.json").write_text("{}")
    assert_same(converted(tmp_path / "x").params, expected("dit"))
    assert f"reading {folder / (index or names[0])}" in capsys.readouterr().err


def test_the_variant_without_a_name_is_preferred_and_several_others_must_be_chosen_from(tmp_path):
    write_folder(tmp_path / "x", [f"{STEM}.fp16.safetensors"])
    (tmp_path / "x" / f"{STEM}.non_ema.safetensors").write_bytes(b"")
    line = refused(tmp_path / "x", tmp_path / "y.safetensors", status=1)
    names = f"{STEM}.fp16.safetensors or {STEM}.non_ema.safetensors"
    assert f"several variants of the weights; expected one file: {names}" in line
    write_torch(tmp_path / "x" / f"{STEM}.bin", diffusers(state_dict("dit")))
    (tmp_path / "x" / f"{STEM}.fp16.safetensors").write_bytes(b"")
    assert_same(converted(tmp_path / "x").params, expected("dit"))


@pytest.mark.parametrize("layout", ["fp16", "bin", "shards", "pipeline", "wrong suffix"])
def test_an_autoencoder_is_read_from_every_layout(tmp_path, layout):
    folder = write_autoencoder(tmp_path / "vae")
    whole = autoencoder.load(folder).fingerprint()
    file = folder / f"{STEM}.safetensors"
    arrays = load_file(file)
    path = folder
    if layout == "pipeline":
        (tmp_path / "model_index.json").write_text("{}")
        path = tmp_path
    elif layout == "fp16":
        file.rename(folder / f"{STEM}.fp16.safetensors")
    elif layout == "bin":
        file.unlink()
        write_torch(folder / f"{STEM}.bin", {name: x.astype(np.float32) for name, x in arrays.items()})
    elif layout == "wrong suffix":
        write_torch(file, {name: x.astype(np.float32) for name, x in arrays.items()})
    else:
        file.unlink()
        names = [f"{STEM}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for number, name in enumerate(names):
            save_file(dict(list(arrays.items())[number::2]), folder / name)
        index = {name: names[number % 2] for number, name in enumerate(arrays)}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert autoencoder.load(path).fingerprint() == whole


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".bin", ".ckpt", ""])
def test_the_content_of_a_file_decides_how_it_is_read(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_torch(path, state_dict("dit"))
    assert_same(converted(path).params, expected("dit"))
    path = tmp_path / f"y{suffix}"
    save_file(state_dict("dit"), path)
    assert_same(converted(path).params, expected("dit"))


def test_a_file_of_ours_is_recognized_under_any_name(tmp_path):
    save_file(state_dict("dit"), tmp_path / "theirs.safetensors")
    run(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", "--num_heads=1")
    (tmp_path / "ours.safetensors").rename(tmp_path / "ours.bin")
    run(tmp_path / "ours.bin", tmp_path / "again.safetensors")
    assert_same(dig_jax.load(tmp_path / "ours.bin").params, expected("dit"))


DOWNLOADS = {
    "LFS": (LFS, "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "page": (b"\n<!DOCTYPE html><html><head>" + b"x" * 3000, "a web page, not the file; download it again"),
    "server": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page, not the file"),
    "text": (b'{"error":"Repository not found"}', "a short text, not the file; download it again: got "),
    "empty": (b"", "empty file; download it again"),
    "gzip": (gzip.compress(bytes(999)), "a compressed archive; unpack it first"),
    "HDF5": (
        b"\x89HDF\r\n\x1a\n" + bytes(999),
        "unsupported format: got an HDF5 file; expected safetensors or",
    ),
}


@pytest.mark.parametrize("kind", DOWNLOADS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_something_else_gives_one_line_that_says_what_to_do(tmp_path, kind, suffix):
    content, message = DOWNLOADS[kind]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    line = refused(path, tmp_path / "y.safetensors", status=1)
    assert line.startswith(f"error: {path}: {message}")
    (tmp_path / "config.json").write_text("{}")
    for read in (autoencoder.load, dig_jax.load):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert message in str(caught.value)
        assert str(path) in str(caught.value)


def test_load_names_the_converter_for_files_of_other_programs(tmp_path):
    write_torch(tmp_path / "x.pt", state_dict("dit"))
    save_file(state_dict("dit"), tmp_path / "x.safetensors")
    write_folder(tmp_path / "pipeline" / "transformer", [f"{STEM}.safetensors"])
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    for name in ("x.pt", "x.safetensors", "pipeline", "pipeline/transformer"):
        with pytest.raises(CheckpointError, match="convert it with `python -m dig_jax.convert`"):
            dig_jax.load(tmp_path / name)


def test_control_characters_of_names_cannot_forge_lines(tmp_path):
    name = "x\nerror: all is well\x1b]0;title\x07"
    save_file(state_dict("dit") | {name: np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    line = refused(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--num_heads=1", status=1)
    assert "unexpected: x error: all is well?]0;title?" in line
    assert line.isprintable()


def test_an_interrupted_conversion_gives_one_line(tmp_path, monkeypatch):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "convert", interrupted)
    assert "interrupted; nothing was written" in refused("x.pt", tmp_path / "y.safetensors", status=130)
