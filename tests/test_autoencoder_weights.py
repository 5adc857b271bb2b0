"""Reading autoencoders: everything of the true format, and nothing else."""

import json
import sys
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dig_jax.autoencoder import load
from dig_jax.errors import CheckpointError

WEIGHTS = "diffusion_pytorch_model.safetensors"
# config.json of the published autoencoders.
PUBLISHED = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TINY = PUBLISHED | {
    "block_out_channels": [4, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 2,
}
NEW, OLD = ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")


def published_shapes(config=PUBLISHED, attention=OLD, kernel=()):
    """Names and shapes of the file, written down from diffusers' modules; `kernel` of attention's linears."""
    widths, layers, latent = (
        config["block_out_channels"],
        config["layers_per_block"],
        config["latent_channels"],
    )
    shapes = {}

    def add(name, size_out, *rest):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (size_out, *rest), (size_out,)

    def resnet(name, size_in, size_out):
        add(f"{name}.norm1", size_in)
        add(f"{name}.conv1", size_out, size_in, 3, 3)
        add(f"{name}.norm2", size_out)
        add(f"{name}.conv2", size_out, size_out, 3, 3)
        if size_in != size_out:
            add(f"{name}.conv_shortcut", size_out, size_in, 1, 1)

    def half(name, kind, widths, layers, size_in, size_out, ends):
        add(f"{name}.conv_in", ends[0], size_in, 3, 3)
        width = widths[0]
        for i, width_out in enumerate(widths):
            block = f"{name}.{kind}_blocks.{i}"
            for j in range(layers):
                resnet(f"{block}.resnets.{j}", width if j == 0 else width_out, width_out)
            if i < len(widths) - 1:
                add(f"{block}.{kind}samplers.0.conv", width_out, width_out, 3, 3)
            width = width_out
        middle = f"{name}.mid_block"
        resnet(f"{middle}.resnets.0", max(ends), max(ends))
        resnet(f"{middle}.resnets.1", max(ends), max(ends))
        add(f"{middle}.attentions.0.group_norm", max(ends))
        for linear in attention:
            add(f"{middle}.attentions.0.{linear}", max(ends), max(ends), *kernel)
        add(f"{name}.conv_norm_out", ends[1])
        add(f"{name}.conv_out", size_out, ends[1], 3, 3)

    first, last = widths[0], widths[-1]
    half("encoder", "down", widths, layers, config["in_channels"], 2 * latent, (first, last))
    half("decoder", "up", widths[::-1], layers + 1, latent, config["out_channels"], (last, first))
    add("quant_conv", 2 * latent, 2 * latent, 1, 1)
    add("post_quant_conv", latent, latent, 1, 1)
    return shapes


def random_arrays(shapes, dtype=np.float32):
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()
    }


def write(folder, arrays, config=TINY):
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / WEIGHTS)
    return folder


def tiny_arrays(**changes):
    return random_arrays(published_shapes(TINY)) | changes


def leaves(autoencoder):
    return jax.tree.leaves(nnx.state(autoencoder))


def test_a_file_with_the_published_names_and_shapes_is_read_whole(tmp_path):
    shapes = published_shapes()
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863
    arrays = random_arrays(shapes)
    autoencoder = load(write(tmp_path, arrays, PUBLISHED))
    (tmp_path / WEIGHTS).unlink()  # 335 MB
    assert sum(leaf.size for leaf in leaves(autoencoder)) == 83_653_863
    assert autoencoder.config.scaling_factor == 0.18215
    total = sum(float(x.astype(np.float64).sum()) for x in arrays.values())
    assert sum(float(np.asarray(x, np.float64).sum()) for x in leaves(autoencoder)) == pytest.approx(total)
    block = autoencoder.decoder.up_blocks[2]
    kernel = arrays["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"]
    np.testing.assert_array_equal(block.resnets[0].conv_shortcut.kernel[0, 0], kernel[:, :, 0, 0].T)
    kernel = arrays["decoder.up_blocks.2.upsamplers.0.conv.weight"]
    np.testing.assert_array_equal(block.resample.conv.kernel[...], kernel.transpose(2, 3, 1, 0))
    linear = autoencoder.encoder.mid_block.attentions[0].to_out.kernel[...]
    np.testing.assert_array_equal(linear, arrays["encoder.mid_block.attentions.0.proj_attn.weight"].T)


@pytest.mark.parametrize(("attention", "kernel"), [(NEW, ()), (OLD, ()), (OLD, (1, 1)), (NEW, (1, 1))])
def test_all_namings_of_attention_are_the_same_autoencoder(tmp_path, attention, kernel):
    expected = load(write(tmp_path, tiny_arrays())).fingerprint()
    arrays = random_arrays(published_shapes(TINY, attention, kernel))
    assert load(write(tmp_path, arrays)).fingerprint() == expected


def test_a_file_is_read_like_its_folder_and_the_scale_is_the_configs(tmp_path):
    write(tmp_path, tiny_arrays(), TINY | {"scaling_factor": 0.13025})
    by_file, by_folder = load(tmp_path / WEIGHTS), load(str(tmp_path))
    assert by_file.config.scaling_factor == 0.13025
    assert by_file.fingerprint() == by_folder.fingerprint()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_files_of_other_precisions_are_read_as_float32(tmp_path, dtype):
    arrays = random_arrays(published_shapes(TINY), dtype)
    bias = load(write(tmp_path, arrays)).quant_conv.bias[...]
    np.testing.assert_array_equal(bias, arrays["quant_conv.bias"].astype(np.float32))


def without(name):
    return {key: x for key, x in tiny_arrays().items() if key != name}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (lambda: without("quant_conv.bias"), "missing: quant_conv.bias$"),
        (
            lambda: tiny_arrays(**{"encoder.extra.weight": np.ones(3, np.float32)}),
            "unexpected: encoder.extra",
        ),
        (
            lambda: tiny_arrays(**{"decoder.mid_block.attentions.0.to_q.bias": np.ones(8, np.float32)}),
            "unexpected: decoder.mid_block.attentions.0.query.bias$",
        ),
        (
            lambda: tiny_arrays(**{"quant_conv.weight": np.ones((8, 4, 1, 1), np.float32)}),
            r"quant_conv.weight has shape \[8, 4, 1, 1\] \(expected \[8, 8, 1, 1\]\)",
        ),
        (lambda: tiny_arrays(**{"quant_conv.bias": np.ones(8, np.int32)}), "quant_conv.bias is I32"),
        (
            lambda: tiny_arrays(**{"decoder.conv_in.bias": np.full(8, np.nan, np.float32)}),
            "decoder.conv_in.bias has non-finite values",
        ),
        (lambda: {f"x{i}": np.ones(1, np.float32) for i in range(1000)}, "x0, x1, x10, x100 and 996 more$"),
    ],
)
def test_mismatched_arrays_are_rejected_in_one_line(tmp_path, arrays, message):
    write(tmp_path, arrays())
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / WEIGHTS))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read "),
        ("[" * 100_000, "cannot read "),
        ("[]", "expected an object"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "run `git lfs pull`"),
        ("<!DOCTYPE html><html>", "a web page, not the file; download it again"),
        (
            json.dumps(TINY | {"_class_name": "VQModel"}),
            "unsupported _class_name='VQModel'; expected 'AutoencoderKL'",
        ),
        (json.dumps(TINY | {"act_fn": "relu"}), "unsupported act_fn='relu'; expected 'silu'"),
        (json.dumps(TINY | {"shift_factor": 0.1}), "unsupported shift_factor=0.1; expected None"),
        (json.dumps(TINY | {"use_quant_conv": False}), "use_quant_conv"),
        (json.dumps(TINY | {"down_block_types": ["AttnDownEncoderBlock2D"]}), "down_block_types"),
        (json.dumps(TINY | {"block_out_channels": [10**9]}), "block_out_channels"),
        (json.dumps(TINY | {"block_out_channels": 8}), "block_out_channels"),
        (json.dumps(TINY | {"layers_per_block": 10**9}), "layers_per_block"),
        (json.dumps(TINY | {"scaling_factor": "large"}), "scaling_factor='large'"),
    ],
)
def test_configs_of_other_networks_are_rejected_in_one_line(tmp_path, text, message):
    write(tmp_path, tiny_arrays())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(
        CheckpointError, match=f"invalid autoencoder '{tmp_path}/nowhere'; expected an existing path"
    ):
        load(tmp_path / "nowhere")
    write(tmp_path, tiny_arrays())
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no such file: .*config.json"):
        load(tmp_path / WEIGHTS)
    write(tmp_path, tiny_arrays())
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no weights; expected {WEIGHTS}"):
        load(tmp_path)


def hub(download):
    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = download
    return module


def test_a_repository_id_is_downloaded_from_the_hub(tmp_path, monkeypatch):
    write(tmp_path, tiny_arrays())
    asked = []

    def download(name, file):
        asked.append((name, file))
        return str(tmp_path / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(download))
    assert load("stabilityai/sd-vae-ft-ema").fingerprint() == load(tmp_path).fingerprint()
    assert asked == [("stabilityai/sd-vae-ft-ema", file) for file in ("config.json", WEIGHTS)]


def test_an_unreachable_hub_is_reported_in_one_line(monkeypatch):
    def download(name, file):
        raise ConnectionError("no route to the host\nand much more")

    monkeypatch.setitem(sys.modules, "huggingface_hub", hub(download))
    with pytest.raises(CheckpointError, match=r"ft-mse, .* \(no route to the host\); .* use a folder"):
        load("stabilityai/sd-vae-ft-mse")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install -e '.\[latents\]'"):
        load("stabilityai/sd-vae-ft-mse")
