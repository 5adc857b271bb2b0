"""The options of modern DiTs: RMSNorm, SwiGLU, norms of queries and keys, rotary positions, class tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_models import apply, inputs, randomized, tiny

from configs import jit
from dig_jax import create_model
from dig_jax.components import model_options
from dig_jax.config import from_dict
from dig_jax.models import registry
from dig_jax.models.dit import DiT
from dig_jax.models.mixers.rotary import rotary_angles, rotate
from dig_jax.models.mixers.softmax import SoftmaxAttention, splash_attention

ALL = {"norm": "rms", "mlp": "swiglu", "qk_norm": True, "rope": True, "class_tokens": 3}
WIDE = {"num_heads": 2, "learn_sigma": False}


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def modern():
    """A model of two blocks with all options, and random parameters."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: tiny("DiT-S/2", depth=2, **WIDE, **ALL)))
    random = np.random.default_rng(1)
    return graphdef, jax.tree.map(lambda x: jnp.float32(0.3 * random.standard_normal(x.shape)), state)


def test_rotary_products_depend_on_the_offset_of_tokens_only():
    """Moving the query and the key by the same rows and columns changes nothing."""
    q, k = normal(2, 1, 1, 1, 16)
    everywhere = [rotate(jnp.broadcast_to(x, (1, 35, 1, 16)), (5, 7))[0, :, 0] for x in (q, k)]
    products = (everywhere[0] @ everywhere[1].T).reshape(5, 7, 5, 7)
    np.testing.assert_allclose(products[:-1, :-2, :-1, :-2], products[1:, 2:, 1:, 2:], atol=1e-4)
    norm = jnp.linalg.norm(everywhere[0], axis=-1)
    np.testing.assert_allclose(norm, jnp.linalg.norm(q), rtol=1e-5)


def test_rotary_angles_are_those_of_lightning_dit():
    """Its table repeats each angle for two adjacent channels, rows before columns."""
    size, rows, columns = 16, 3, 4
    frequencies = 1 / 10000 ** (np.arange(0, size // 2, 2) / (size // 2))
    row, column = (np.arange(n)[:, None] * frequencies for n in (rows, columns))
    table = np.concatenate(
        np.broadcast_arrays(row[:, None].repeat(2, -1), column[None].repeat(2, -1)), axis=-1
    ).reshape(-1, size)
    np.testing.assert_allclose(rotary_angles((rows, columns), size), table[:, ::2], rtol=1e-12)


def test_tokens_in_front_of_the_grid_are_not_rotated():
    x = normal(1, 9, 2, 8)
    np.testing.assert_allclose(rotate(x, (2, 3))[:, :4], x[:, :4], rtol=1e-6)
    np.testing.assert_array_equal(rotate(x, (2, 3))[:, 3:], rotate(x[:, 3:], (2, 3)))


def test_the_parameters_are_those_of_the_options(modern):
    _, params = modern
    names = {".".join(map(str, path[3:])) for path in dict(nnx.to_flat_state(params)) if path[0] == "blocks"}
    assert params["final"]["norm"]["weight"][...].shape == (32,)
    norms = {"norm1.weight", "norm2.weight", "mixer.q_norm.weight", "mixer.k_norm.weight"}
    mlp = {f"mlp.{name}.{leaf}" for name in ("gate_up", "down") for leaf in ("kernel", "bias")}
    assert names >= norms | mlp and not any(name.startswith("mlp.hidden") for name in names)
    assert params["class_tokens"]["positions"][...].shape == (3, 32)
    assert registry.resolve_options("DiT-S/2", mlp="swiglu")[1].mlp_width == 8 * 384 // 3


@pytest.mark.parametrize(("size", "depth", "w"), [("B", 12, 768), ("XL", 28, 1152)])
def test_lightning_dit_has_the_released_codes_parameters(size, depth, w):
    """On VA-VAE's latents, counted from the modules of the released code."""
    options = {"norm": "rms", "mlp": "swiglu", "rope": True, "in_channels": 32, "learn_sigma": False}
    make = functools.partial(create_model, f"DiT-{size}/1", input_size=16, num_classes=1000, **options)
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    hidden = 8 * w // 3
    attention, mlp = 4 * w * w + 4 * w, 3 * w * hidden + 2 * hidden + w
    block = attention + mlp + 2 * w + 6 * (w * w + w)
    embeddings = 32 * w + w + 256 * w + w + w * w + w + 1001 * w
    final = w + 2 * (w * w + w) + 32 * w + 32
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == depth * block + embeddings + final


@pytest.mark.parametrize(("size", "millions"), [("B", 131), ("L", 459), ("H", 953)])
def test_jit_has_the_published_number_of_parameters(size, millions):
    settings = from_dict(jit.get_config(f"{size}/16").to_dict())
    _, options = model_options(settings.model)
    options = dataclasses.replace(options, in_channels=3)
    make = functools.partial(DiT, "DiT", options, input_size=(256, 256), num_classes=1000)
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e6) == millions


def test_blocks_before_the_first_with_class_tokens_do_not_see_them():
    """Taps before and after have the image's tokens only, and a scan is cut where the tokens enter."""
    model = tiny("DiT-S/2", depth=3, class_tokens=2, class_tokens_from=2, **WIDE)
    graphdef, params = randomized(model)
    x, t, y = inputs()

    @jax.jit
    def hidden(params):
        return nnx.merge(graphdef, params).outputs(x, t, y, taps=(0, 1, 2)).hidden

    before = hidden(params)
    positions = params["class_tokens"]["positions"]
    params["class_tokens"]["positions"] = positions.replace(-9 * positions[...])
    after = hidden(params)
    assert all(tokens.shape == (2, 16, 32) for tokens in after.values())
    for block in (0, 1):
        np.testing.assert_array_equal(before[block], after[block])
    assert not np.allclose(before[2], after[2], atol=1e-3)


def test_patches_go_through_the_bottleneck():
    model = tiny("DiT-S/2", depth=1, patch_bottleneck=3, **WIDE)
    patches = normal(1, 16, 16)
    tokens = model.patch_embed(patches) - model.patch_embed(0 * patches)
    assert np.linalg.matrix_rank(np.asarray(tokens[0]), tol=1e-3) == 3


def test_every_option_changes_the_output(modern):
    """The output of the image keeps its shape; class tokens reach it and show the label."""
    graphdef, params = modern
    x, t, y = inputs()
    out = apply(graphdef, params, x, t, y)
    assert out.shape == x.shape and float(jnp.abs(out).min()) > 0
    rest = dict(nnx.to_flat_state(params))
    for path in [("class_tokens", "positions"), *[p for p in rest if p[-2] in ("q_norm", "k_norm")]]:
        changed = nnx.from_flat_state(
            [(p, v.replace(v[...] + 1) if p == path else v) for p, v in rest.items()]
        )
        assert not np.allclose(apply(graphdef, changed, x, t, y), out, atol=1e-5), path
    moved = apply(graphdef, params, jnp.roll(x, 2, axis=1), t, y)
    assert not np.allclose(jnp.roll(moved, -2, axis=1), out, atol=1e-3)


def test_norms_of_queries_and_keys_bound_the_logits(modern):
    """The model does not depend on the scale of the projections of queries and keys."""
    graphdef, params = modern
    x, t, y = inputs()
    scale = jnp.repeat(jnp.array([3.0, 5.0, 1.0]), 32)
    flat = [
        (path, v.replace(v[...] * scale) if "qkv_proj" in path else v)
        for path, v in nnx.to_flat_state(params)
    ]
    scaled = apply(graphdef, nnx.from_flat_state(flat), x, t, y)
    np.testing.assert_allclose(scaled, apply(graphdef, params, x, t, y), rtol=1e-3, atol=1e-4)


def test_splash_attention_equals_plain_attention_with_its_gradients():
    """As the interpreter runs the TPU's kernel, with fewer queries than keys."""
    q, k, v = normal(1, 128, 2, 8), normal(1, 256, 2, 8, seed=1), normal(1, 256, 2, 8, seed=2)

    def both(attend):
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(jnp.cos(out))

    got = jax.jit(lambda: both(functools.partial(splash_attention, interpret=True)))()
    expected = jax.jit(lambda: both(jax.nn.dot_product_attention))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_tokens": -1}, "invalid class_tokens=-1; expected 0 or a positive number"),
        ({"class_tokens": 2, "num_classes": 0}, "invalid class_tokens=2 without classes; expected 0"),
        ({"class_tokens_from": 1}, "invalid class_tokens_from=1; expected the index of a block, at most 0"),
        ({"patch_bottleneck": 0}, "invalid patch_bottleneck=0; expected None or a positive number"),
        ({"mlp": "relu"}, "invalid mlp='relu'; expected one of swiglu, gelu"),
        ({"rope": True, "num_heads": 16}, "invalid num_heads=16 with rope: got 2 channels per head"),
    ],
)
def test_invalid_options_say_what_is_expected(options, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: tiny("DiT-S/2", depth=1, **options))


def test_dig_has_norms_and_rotary_positions_in_its_blocks_with_softmax_attention():
    options = {"mixer": "gla+softmax", "qk_norm": True, "rope": True, "num_heads": 2}
    model = nnx.eval_shape(lambda: tiny("DiG-S/2", depth=2, implementation="reference", **options))
    attention = [module for _, module in nnx.iter_modules(model) if isinstance(module, SoftmaxAttention)]
    assert attention and all(a.rope and a.q_norm is not None for a in attention)
    for option in ("rope", "qk_norm"):
        with pytest.raises(ValueError, match=f"invalid {option}=True for mixer='gla'; expected blocks with"):
            registry.resolve_options("DiG-S/2", **{option: True})
    with pytest.raises(ValueError, match="unknown option 'class_tokens' of DiG"):
        registry.resolve_options("DiG-S/2", class_tokens=2)
