"""Files and outputs of PyTorch and diffusers, if they are installed, compared with ours."""

import zipfile

import jax.numpy as jnp
import pytest
from test_convert import golden, nhwc, relative_error
from upstream_files import HEADS, assert_same, expected, run, state_dict

import dig_jax
from dig_jax.checkpoints.reader import read_model
from dig_jax.files.pytorch.writer import write_torch


@pytest.mark.parametrize("case", ["dig_plain", "dig_skip", "dit"])
def test_a_file_written_by_torch_converts(tmp_path, case):
    """test_convert checks the outputs of these parameters."""
    torch = pytest.importorskip("torch")
    arrays = {name: torch.from_numpy(array) for name, array in state_dict(case).items()}
    model = torch.nn.ParameterDict()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(arrays["x_embedder.proj.bias"])])
    content = {"model": model.state_dict(), "ema": arrays, "opt": optimizer.state_dict(), "args": object}
    torch.save(content, tmp_path / "x.pt")
    run(tmp_path / "x.pt", tmp_path / "x.safetensors", *HEADS.get(case, []))
    assert_same(read_model(tmp_path / "x.safetensors")[2], expected(case))
    run(tmp_path / "x.safetensors", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    for name in arrays.keys() - {"pos_embed"}:
        assert torch.equal(back[name], arrays[name])
    with zipfile.ZipFile(tmp_path / "back.pt") as archive:
        assert archive.testzip() is None


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["ours", "torch"])
@pytest.mark.parametrize("case", ["dig_plain", "dig_skip", "dit"])
def test_golden_weights_in_a_file_give_the_golden_outputs(tmp_path, case, writer):
    path, arrays = tmp_path / "x.pt", state_dict(case)
    if writer == "ours":
        write_torch(path, arrays)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    run(path, tmp_path / "x.safetensors", *HEADS.get(case, []))
    sampler, data = dig_jax.load(tmp_path / "x.safetensors"), golden(case)
    t, y = (jnp.asarray(data[name], jnp.int32) for name in "ty")
    out = sampler.components.denoise(sampler.params, nhwc(data["x"]), t, y)
    assert relative_error(out, nhwc(data["out"])) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # warnings of other packages
def test_a_dit_computes_the_same_in_diffusers_and_here(tmp_path):
    """diffusers' timestep frequencies are set to the released DiT's."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3, "num_embeds_ada_norm": 10}
    theirs = diffusers.DiTTransformer2DModel(
        **sizes, in_channels=4, out_channels=8, sample_size=8, patch_size=2, norm_eps=1e-6
    ).eval()
    shared = theirs.transformer_blocks[0].norm1.emb
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(shared.state_dict())
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("one", "shards"):
        run(tmp_path / folder, tmp_path / f"{folder}.safetensors")
    sampler = dig_jax.load(tmp_path / "one.safetensors")
    assert_same(dig_jax.load(tmp_path / "shards.safetensors").params, sampler.params)
    run(tmp_path / "one.safetensors", tmp_path / "back")
    back = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "back").eval()
    assert back.state_dict().keys() == theirs.state_dict().keys()

    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([17, 803]), torch.tensor([3, 10])
    out = sampler.components.denoise(sampler.params, nhwc(x.numpy()), jnp.asarray(t), jnp.asarray(y))
    for model in (theirs, back):
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        with torch.no_grad():
            expected = model(x, timestep=t, class_labels=y, return_dict=False)[0].numpy()
        assert relative_error(out, nhwc(expected)) < 1e-4
