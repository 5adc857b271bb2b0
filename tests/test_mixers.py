"""Patterns of mixers, local attention and the gates of GLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax import convert, create_model
from dig_jax.models.dig import DIRECTIONS
from dig_jax.models.isolation import isolate_attention
from dig_jax.models.mixers import GatedLinearAttention, LocalAttention, SoftmaxAttention
from dig_jax.models.mixers.local import attend_locally
from dig_jax.models.mixers.pattern import parse_pattern
from dig_jax.models.registry import resolve_options
from dig_jax.parallel import make_mesh
from dig_jax.testing import random_params, tiny_components, tiny_settings

SMALL = {"model__hidden_size": 32, "model__num_heads": 1, "model__mlp_hidden_size": 48}


def blocks_of(name, **overrides):
    """The partially applied mixer of every block."""
    options = resolve_options(name, **overrides)[1]
    found = []
    for level in options.levels:
        pattern = options.pattern(level).blocks
        found += [pattern[block % len(pattern)].mixer for block in range(level.depth)]
    return found


def kinds(name, **overrides):
    names = {GatedLinearAttention: "g", SoftmaxAttention: "s", LocalAttention: "l"}
    return "".join(names[mixer.func] for mixer in blocks_of(name, **overrides))


def test_a_pattern_repeats_to_the_depth_and_the_directions_follow_the_index():
    assert kinds("DiG-S/2", mixer="gla*3+softmax") == "gggs" * 3
    assert kinds("DiG-S/2", mixer="gla + local * 2") == "gll" * 4
    assert kinds("DiG-S/2", mixer="softmax") == "s" * 12
    mixers = blocks_of("DiG-S/2", mixer="gla*2+local")
    directions = {i: m.keywords["direction"] for i, m in enumerate(mixers) if "direction" in m.keywords}
    assert directions == {i: DIRECTIONS[i % 4] for i in range(12) if i % 3 < 2}


def test_only_the_bottleneck_of_a_u_may_have_another_mixer():
    assert kinds("U-DiG-S", bottleneck_mixer="softmax") == "gggg" + "ssss" + "gggg"
    assert kinds("U-DiG-S", mixer="local", bottleneck_mixer="gla+softmax") == "llll" + "gsgs" + "llll"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mixer": "glaa"}, "invalid mixer='glaa': unknown mixer 'glaa'; did you mean 'gla'"),
        (
            {"mixer": "gla*3+conv"},
            "invalid mixer='gla\\*3\\+conv': unknown mixer 'conv'.*; expected gla, softmax or",
        ),
        ({"mixer": "gla*"}, "invalid mixer='gla\\*': got 'gla\\*'; expected mixers with counts"),
        ({"mixer": ""}, "invalid mixer='': got ''; expected mixers with counts"),
        ({"mixer": "gla*0"}, "invalid mixer='gla\\*0': got 'gla\\*0'; expected mixers with counts"),
        ({"mixer": "gla*4+softmax"}, "for depth=12; expected a pattern whose 5 blocks divide 12"),
        (
            {"name": "U-DiG-S", "mixer": "gla*2+local"},
            "for a level of 2 blocks; expected a pattern whose 3 blocks",
        ),
        ({"window": 4}, "invalid window=4; expected an odd number"),
        ({"mixer": "local"}, "invalid window=9 for an input of 8 × 32: got 4 × 16 tokens; .* of at most 4"),
        (
            {"name": "U-DiG-S", "bottleneck_mixer": "local"},
            "invalid window=9 for an input of 8 × 32: got 2 × 8 tokens; expected a window of at most 2",
        ),
    ],
)
def test_invalid_mixers_are_errors_that_say_what_would_be_right(overrides, message):
    name = overrides.get("name", "DiG-S/2")
    options = {key: value for key, value in overrides.items() if key != "name"}
    make = functools.partial(create_model, name, input_size=(8, 32), num_classes=3, **options)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


@given(
    st.lists(
        st.tuples(st.sampled_from(["gla", "softmax", "local"]), st.integers(1, 20)), min_size=1, max_size=4
    )
)
@settings(max_examples=20, deadline=None)
def test_a_pattern_lists_each_mixer_as_often_as_its_count_says(parts):
    text = "+".join(f"{name}*{count}" for name, count in parts)
    assert parse_pattern(text) == tuple(name for name, count in parts for _ in range(count))


def windows(q, k, v, grid, window):
    """Local attention by a mask over all pairs of tokens."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    near = np.maximum(*(np.abs(x[:, None] - x) for x in (rows, columns))) <= window // 2
    return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(near)[None, None])


@pytest.mark.parametrize(("grid", "window"), [((5, 9), 5), ((8, 8), 1), ((9, 4), 3), ((11, 12), 11)])
def test_local_attention_equals_masked_attention_with_its_gradients(grid, window):
    random = np.random.default_rng(0)
    q, k, v, weight = (jnp.float32(random.standard_normal((2, grid[0] * grid[1], 2, 4))) for _ in range(4))

    def value(attend):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.vdot(attend(*x), weight), argnums=(0, 1, 2)))(
            q, k, v
        )

    local = value(functools.partial(attend_locally, grid=grid, window=window))
    expected = value(functools.partial(windows, grid=grid, window=window))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), local, expected)


def test_local_attention_on_rows_of_several_devices_equals_that_of_one():
    mixer = LocalAttention(16, num_heads=2, window=5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), (2, 48, 16))

    def mix(x):
        return nnx.merge(graphdef, state)(x, (8, 6))

    expected = jax.jit(mix)(x)
    with jax.set_mesh(make_mesh(tiny_settings(mesh__data=1, mesh__context=4).mesh, 2)):
        np.testing.assert_allclose(jax.jit(lambda x: mix(x))(x), expected, rtol=1e-5, atol=1e-5)


def test_a_hybrid_is_scanned_and_isolates_the_tokens_of_all_kinds_of_attention():
    components = tiny_components(
        **SMALL, model__depth=8, model__mixer="gla+softmax+local*2", model__window=1, model__conv="none"
    )
    params = random_params(components)
    groups = params["blocks"]["groups"]
    assert [sorted({"q_proj", "qkv_proj"} & groups[i]["mixer"].keys()) for i in range(4)] == [
        ["q_proj"],
        *[["qkv_proj"]] * 3,
    ]
    assert groups[1]["mixer"]["qkv_proj"]["bias"].shape[0] == 2
    model = nnx.merge(nnx.split(components.abstract_model)[0], params)
    out = jax.jit(model)(jnp.ones((1, 4, 4, 1)), jnp.array([3]), jnp.array([0]))
    assert np.isfinite(out).all() and np.abs(out).max() > 0
    isolate_attention(model)
    flags = [getattr(module, "isolated", None) for _, module in nnx.iter_modules(model)]
    assert flags.count(True) == 3 and False not in flags


def test_upstreams_format_refuses_other_mixers():
    model = tiny_components(**SMALL, model__mixer="softmax").abstract_model
    with pytest.raises(ValueError, match="unsupported mixer='softmax'; expected 'gla'"):
        convert.load_torch_state_dict(model, {})
