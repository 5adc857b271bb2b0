"""Converted checkpoints of flow matching predict our velocity: SiT, REPA and LightningDiT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from test_convert import fresh
from upstream_files import expected, refused, run, state_dict

from dig_jax.checkpoints.reader import read_model
from dig_jax.components import Components
from dig_jax.convert.diffusers import config_of
from dig_jax.convert.names import read_params, torch_arrays
from dig_jax.files.safetensors import StoredArray
from dig_jax.models.embeddings import sincos_positions
from dig_jax.testing import tiny_settings, write_checkpoint

WIDTH, HEADS, CHANNELS, SIDE = 32, 2, 8, 4


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("kind", "sign", "embedded"), [("sit", -1, 0.3), ("repa", 1, 0.7)])
def test_models_with_dits_network_get_their_time_and_our_sign(tmp_path, kind, sign, embedded):
    """At t = 0.7, with 1 for noise."""
    extra = {"projectors.0.weight": np.zeros((2, 2), np.float32)} if kind == "repa" else {}
    save_file(state_dict("dit") | extra, tmp_path / f"{kind}.safetensors")
    run(tmp_path / f"{kind}.safetensors", tmp_path / "ours.safetensors", "--num_heads=1")
    components, _, params = read_model(tmp_path / "ours.safetensors")
    assert components.config.diffusion.process == "flow"
    x, y = jnp.asarray(normal(2, 8, 8, 4)), jnp.array([3, 9])
    plain = Components(with_steps(components.config), components.stored_spec)
    found, theirs = (
        jax.jit(one.denoise)(p, x, jnp.full(2, t), y)
        for one, p, t in ((components, params, 700.0), (plain, expected("dit"), embedded))
    )
    np.testing.assert_allclose(found, sign * theirs, rtol=1e-4, atol=1e-5)
    assert "unsupported time_input" in refused(
        tmp_path / "ours.safetensors", tmp_path / "back.safetensors", status=1
    )


def with_steps(config):
    """The config of a model whose time embedding gets the timestep."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, time_input="steps"))


def lightning(qk_norm):
    """Random parameters under LightningDiT's names, of one block on tokens of single pixels."""
    w, hidden = WIDTH, 8 * WIDTH // 3
    shapes = {
        "x_embedder.proj.weight": (w, CHANNELS, 1, 1),
        "x_embedder.proj.bias": (w,),
        "t_embedder.mlp.0.weight": (w, 256),
        "t_embedder.mlp.0.bias": (w,),
        "t_embedder.mlp.2.weight": (w, w),
        "t_embedder.mlp.2.bias": (w,),
        "y_embedder.embedding_table.weight": (11, w),
        "final_layer.norm_final.weight": (w,),
        "final_layer.linear.weight": (CHANNELS, w),
        "final_layer.linear.bias": (CHANNELS,),
        "final_layer.adaLN_modulation.1.weight": (2 * w, w),
        "final_layer.adaLN_modulation.1.bias": (2 * w,),
    }
    block = {
        "norm1.weight": (w,),
        "norm2.weight": (w,),
        "attn.qkv.weight": (3 * w, w),
        "attn.qkv.bias": (3 * w,),
        "attn.proj.weight": (w, w),
        "attn.proj.bias": (w,),
        "mlp.w12.weight": (2 * hidden, w),
        "mlp.w12.bias": (2 * hidden,),
        "mlp.w3.weight": (w, hidden),
        "mlp.w3.bias": (w,),
        "adaLN_modulation.1.weight": (6 * w, w),
        "adaLN_modulation.1.bias": (6 * w,),
    }
    if qk_norm:
        block |= {"attn.q_norm.weight": (w // HEADS,), "attn.k_norm.weight": (w // HEADS,)}
    shapes |= {f"blocks.0.{name}": shape for name, shape in block.items()}
    arrays = {name: 0.2 * normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    table = {"pos_embed": sincos_positions((SIDE, SIDE), w)[None], "feat_rope.freqs_cos": np.ones(1)}
    return arrays | table | {"feat_rope.freqs_sin": np.ones(1)}


def rotated(x):
    """LightningDiT's rotation of [b, h, t, d]: adjacent channels, rows in the first half."""
    half = x.shape[-1] // 2
    frequencies = 1 / 10000 ** (np.arange(0, half, 2) / half)
    angles = (np.arange(SIDE)[:, None] * frequencies).repeat(2, axis=1)
    rows, columns = np.broadcast_arrays(angles[:, None], angles[None])
    angles = np.concatenate([rows, columns], axis=-1).reshape(SIDE * SIDE, -1)
    turned = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return x * np.cos(angles) + turned * np.sin(angles)


def reference(p, x, t, y):
    """LightningDiT's forward pass of images [b, h, w, c] at data time t."""

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(name, x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}.weight"]

    def silu(x):
        return x / (1 + np.exp(-x))

    b, w = len(x), WIDTH
    tokens = x.reshape(b, -1, CHANNELS) @ p["x_embedder.proj.weight"][:, :, 0, 0].T
    tokens = tokens + p["x_embedder.proj.bias"] + p["pos_embed"]
    angles = t[:, None] * np.exp(-np.log(10000) / 128 * np.arange(128))
    c = silu(linear("t_embedder.mlp.0", np.concatenate([np.cos(angles), np.sin(angles)], axis=1)))
    c = silu(linear("t_embedder.mlp.2", c) + p["y_embedder.embedding_table.weight"][y])
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(
        linear("blocks.0.adaLN_modulation.1", c)[:, None], 6, axis=-1
    )
    h = norm("blocks.0.norm1", tokens) * (1 + scale1) + shift1
    q, k, v = linear("blocks.0.attn.qkv", h).reshape(b, -1, 3, HEADS, w // HEADS).transpose(2, 0, 3, 1, 4)
    if "blocks.0.attn.q_norm.weight" in p:
        q, k = norm("blocks.0.attn.q_norm", q), norm("blocks.0.attn.k_norm", k)
    scores = rotated(q) @ rotated(k).swapaxes(-1, -2) / np.sqrt(w // HEADS)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True) @ v).swapaxes(1, 2).reshape(b, -1, w)
    tokens = tokens + gate1 * linear("blocks.0.attn.proj", out)
    h = norm("blocks.0.norm2", tokens) * (1 + scale2) + shift2
    gate, up = np.split(linear("blocks.0.mlp.w12", h), 2, axis=-1)
    tokens = tokens + gate2 * linear("blocks.0.mlp.w3", silu(gate) * up)
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", c)[:, None], 2, axis=-1)
    return linear("final_layer.linear", norm("final_layer.norm_final", tokens) * (1 + scale) + shift)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_lightning_dit_is_our_dit(tmp_path, qk_norm):
    arrays = lightning(qk_norm)
    save_file(arrays, tmp_path / "lightningdit.safetensors")
    run(tmp_path / "lightningdit.safetensors", tmp_path / "ours.safetensors", "--num_heads=2")
    components, _, params = read_model(tmp_path / "ours.safetensors")
    model = components.config.model
    assert (model.norm, model.mlp, model.rope, model.qk_norm) == ("rms", "swiglu", True, qk_norm)
    assert (model.time_input, model.learn_sigma, model.mlp_hidden_size) == ("data", False, None)
    x, y, t = normal(2, SIDE, SIDE, CHANNELS, seed=99), np.array([3, 10]), np.array([0.25, 0.9])
    found = jax.jit(components.denoise)(params, jnp.asarray(x), jnp.float32(1000 * (1 - t)), jnp.asarray(y))
    expected_ = reference(arrays, x, t, y).reshape(x.shape)
    np.testing.assert_allclose(found, -expected_, rtol=1e-3, atol=1e-4)


def test_class_tokens_have_no_names_elsewhere():
    model = nnx.eval_shape(lambda: fresh("dit", class_tokens=2))
    with pytest.raises(ValueError, match="unsupported class_tokens=2; expected 0"):
        torch_arrays(model, {})


@pytest.mark.parametrize("option", [{"rope": True}, {"mlp": "swiglu"}, {"norm": "rms"}, {"qk_norm": True}])
def test_diffusers_has_no_modern_dits(option):
    model = nnx.eval_shape(lambda: fresh("dit", **{"num_heads": 2, **option}))
    with pytest.raises(ValueError, match=f"unsupported {next(iter(option))}=.* for diffusers"):
        config_of(model, "ddpm")


def test_diffusers_does_not_get_a_model_that_its_pipeline_samples_wrongly(tmp_path):
    settings = tiny_settings(model__name="DiT-S/2", diffusion__process="flow", model__learn_sigma=False)
    write_checkpoint(tmp_path / "run", settings)
    line = refused(tmp_path / "run", tmp_path / "theirs", status=1)
    assert "unsupported diffusion.process='flow' for diffusers; expected 'ddpm'" in line
    assert not (tmp_path / "theirs").exists()


def test_rotary_models_keep_their_values_in_both_directions():
    model = nnx.eval_shape(lambda: fresh("dit", rope=True, qk_norm=True, num_heads=2))
    shapes = {path: variable.shape for path, variable in nnx.to_flat_state(nnx.split(model)[1])}
    params = {path: normal(*shape, seed=n) for n, (path, shape) in enumerate(shapes.items())}
    stored = {
        name: StoredArray(x.shape, "float32", lambda x=x: x)
        for name, x in torch_arrays(model, params).items()
    }
    back = read_params(model, stored)
    assert back.keys() == params.keys()
    for path, value in params.items():
        np.testing.assert_array_equal(back[path], value, err_msg=str(path))
