"""diffusers' layout of DiT to ours and back; test_convert_torch compares with diffusers' own code."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from upstream_files import HEADS, assert_same, expected, refused, run, state_dict

from dig_jax.checkpoints.reader import read_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


def diffusers(arrays):
    """DiT's parameters as diffusers names them."""
    renamed = {}
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    inner = {"adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0"}
    inner |= {"mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    shared = {"t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1"}
    shared |= {"t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2"}
    shared |= {"y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table"}
    for name, array in arrays.items():
        stem, leaf = name.rsplit(".", 1) if "." in name else (name, "")
        if stem in names:
            renamed[f"{names[stem]}.{leaf}"] = array
        elif stem in shared:
            renamed |= {f"transformer_blocks.{i}.{shared[stem]}.{leaf}": array.copy() for i in range(4)}
        elif stem.startswith("blocks."):
            _, block, part = stem.split(".", 2)
            start = f"transformer_blocks.{block}"
            if part == "attn.qkv":
                for letter, piece in zip("qkv", np.split(array, 3), strict=True):
                    renamed[f"{start}.attn1.to_{letter}.{leaf}"] = np.ascontiguousarray(piece)
            else:
                renamed[f"{start}.{inner[part]}.{leaf}"] = array
    return renamed


@pytest.fixture
def diffusers_folder(tmp_path):
    def write(**changes):
        folder = tmp_path / "transformer"
        folder.mkdir(exist_ok=True)
        arrays = diffusers(state_dict("dit")) | changes
        save_file(arrays, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"num_attention_heads": 1, "sample_size": 8}))
        return folder

    return write


def test_a_diffusers_folder_converts_to_a_dit(diffusers_folder, tmp_path):
    run(diffusers_folder(), tmp_path / "ours.safetensors")
    components, _, params = read_model(tmp_path / "ours.safetensors")
    settings = components.config
    assert_same(params, expected("dit"))
    assert (settings.model.num_heads, settings.data.options["image_size"]) == (1, 8)


def test_diffusers_blocks_with_different_embeddings_are_errors(diffusers_folder, tmp_path):
    name = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    line = refused(diffusers_folder(**{name: np.zeros(32, np.float32)}), tmp_path / "x.safetensors", status=1)
    assert "copies of t_embedder.mlp.0.bias differ between blocks" in line
    name = "transformer_blocks.2.attn1.to_k.bias"
    line = refused(diffusers_folder(**{name: np.zeros(3, np.float32)}), tmp_path / "x.safetensors", status=1)
    assert "to_k or to_v does not match transformer_blocks.2.attn1.to_q.bias" in line


def test_our_dit_converts_to_a_diffusers_folder_and_back(diffusers_folder, tmp_path):
    save_file(state_dict("dit"), tmp_path / "upstream.safetensors")
    run(tmp_path / "upstream.safetensors", tmp_path / "ours.safetensors", *HEADS["dit"])
    run(tmp_path / "ours.safetensors", tmp_path / "theirs")
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == ["config.json", WEIGHTS]
    written, hand_made = (load_file(folder / WEIGHTS) for folder in (tmp_path / "theirs", diffusers_folder()))
    assert_same(written, hand_made)
    about = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert about["_class_name"] == "DiTTransformer2DModel"
    sizes = ("num_attention_heads", "attention_head_dim", "num_layers", "num_embeds_ada_norm")
    assert [about[name] for name in sizes] == [1, 32, 4, 10]
    assert [about[name] for name in ("in_channels", "out_channels", "sample_size", "patch_size")] == [
        4,
        8,
        8,
        2,
    ]
    run(tmp_path / "theirs", tmp_path / "again.safetensors")
    assert_same(read_model(tmp_path / "again.safetensors")[2], expected("dit"))


@pytest.mark.parametrize("case", ["dig_plain", "dig_unconditional_rgb"])
def test_models_that_diffusers_lacks_are_errors(tmp_path, case):
    save_file(state_dict(case), tmp_path / "upstream.safetensors")
    run(tmp_path / "upstream.safetensors", tmp_path / "ours.safetensors")
    line = refused(tmp_path / "ours.safetensors", tmp_path / "theirs", status=1)
    assert "unsupported model for diffusers' DiTTransformer2DModel; expected a DiT with classes" in line
    assert not (tmp_path / "theirs").exists()


@pytest.fixture
def in_shards(diffusers_folder):
    """A folder as diffusers writes large models: an index, and files that it names."""
    folder = diffusers_folder()
    arrays = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    of = {name: names[number % 3] for number, name in enumerate(arrays)}
    for file in names:
        save_file({name: arrays[name] for name in arrays if of[name] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": of})
    )
    return folder


def test_a_sharded_model_is_read_as_one(in_shards, tmp_path):
    run(in_shards, tmp_path / "ours.safetensors")
    assert_same(read_model(tmp_path / "ours.safetensors")[2], expected("dit"))
    run(in_shards / f"{WEIGHTS}.index.json", tmp_path / "again.safetensors")
    assert_same(read_model(tmp_path / "again.safetensors")[2], expected("dit"))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json: invalid JSON: Expecting property name"),
        ("[]", "index.json: invalid JSON: got a list; expected an object"),
        ('{"weight_map": {}}', "missing weight_map; expected the index"),
        (
            '{"weight_map": {"a": "../elsewhere.safetensors"}}',
            "got '../elsewhere.safetensors'; expected",
        ),
        ('{"weight_map": {"a": "/etc/passwd"}}', "got '/etc/passwd'; expected"),
        ('{"weight_map": {"a": 3}}', "got '3'; expected"),
        ('{"weight_map": {"a": "none.safetensors"}}', "none.safetensors: no such file"),
    ],
)
def test_an_invalid_index_gives_one_line(in_shards, tmp_path, index, message):
    (in_shards / f"{WEIGHTS}.index.json").write_text(index)
    assert message in refused(in_shards, tmp_path / "x.safetensors", status=1)


def test_shards_with_a_duplicate_array_are_errors(in_shards, tmp_path):
    first, second, _ = sorted(in_shards.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    line = refused(in_shards, tmp_path / "x.safetensors", status=1)
    assert f"{WEIGHTS}.index.json: " in line
    assert "duplicate name" in line
