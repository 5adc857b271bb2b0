"""Patterns of mixers, local attention and the gates of GLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax import convert, create_model
from dig_jax.components import Components
from dig_jax.models.dig import DIRECTIONS, DiGOptions
from dig_jax.models.mixers import GatedLinearAttention, LocalAttention, SoftmaxAttention, softmax
from dig_jax.models.mixers.gla import half_lives, parse_half_life
from dig_jax.models.mixers.local import attend_locally
from dig_jax.models.mixers.pattern import parse_pattern
from dig_jax.models.registry import resolve_options
from dig_jax.parallel import make_mesh
from dig_jax.testing import tiny_components, tiny_settings

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


def directions(name, **overrides):
    mixers = blocks_of(name, **overrides)
    return [mixer.keywords["direction"] for mixer in mixers if "direction" in mixer.keywords]


def test_a_pattern_repeats_to_the_depth_and_its_scans_take_turns_in_four_directions():
    assert kinds("DiG-S/2", mixer="gla*3+softmax") == "gggs" * 3
    assert kinds("DiG-S/2", mixer="gla + local * 2") == "gll" * 4
    assert kinds("DiG-S/2", mixer="softmax") == "s" * 12
    assert directions("DiG-S/2", mixer="gla*2+local") == list(DIRECTIONS) * 2
    assert directions("DiG-S/2", mixer="gla+local", depth=8) == list(DIRECTIONS)
    assert set(directions("DiG-S/2", mixer="gla*3+softmax")) == set(DIRECTIONS)
    assert directions("U-DiG-S", mixer="gla+local", bottleneck_mixer="softmax") == list(DIRECTIONS)


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
        (
            {"gate_normalizer": "0"},
            "invalid gate_normalizer='0'; expected a positive number of tokens, one per head",
        ),
        ({"gate_normalizer": "gird"}, "invalid gate_normalizer='gird'; did you mean 'grid'"),
        (
            {"gate_normalizer": (16.0, 32.0)},
            "gate_normalizer: got 2 numbers for 6 heads; expected one number, one per",
        ),
        ({"num_heads": 5}, r"num_heads=5; expected a divisor of the key width 192 \(0.5 × 384\)"),
        ({"value_expansion": 1.3}, "num_heads=6; expected a divisor of the value width 499.2"),
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
@settings(max_examples=20)
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


@pytest.mark.parametrize(("own", "tokens"), [(7, 7), (256, 256), (257, 257), (300, 900)])
def test_attention_in_blocks_equals_plain_attention_with_its_gradients(own, tokens):
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, n, 3, 8)) for i, n in enumerate((own, tokens, tokens))
    )

    def run(attend):
        def function(q, k, v):
            o = attend(4 * q, k, v)
            return jnp.square(o).sum(), o

        return jax.grad(function, (0, 1, 2), has_aux=True)(q, k, v), jax.jvp(
            attend, (q, k, v), (v[:, :own], k, v)
        )

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        run(softmax.attend_in_blocks),
        run(jax.nn.dot_product_attention),
    )


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_attention_in_blocks_is_finite_for_large_logits_and_rounds_as_plain_attention(logit):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 300, 2, 16), jnp.bfloat16)
    found = softmax.attend_in_blocks(logit * q, k, v)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found, jax.nn.dot_product_attention(logit * q, k, v), atol=0.02, rtol=0.02)


def test_a_hybrid_is_scanned_and_isolates_the_tokens_of_all_kinds_of_attention():
    components = tiny_components(
        **SMALL,
        model__depth=16,
        model__mixer="gla*2+softmax+local",
        model__window=1,
        model__conv="none",
        model__implementation="reference",
    )
    model = components.abstract_model
    params = nnx.to_pure_dict(nnx.split(model)[1])
    groups = params["blocks"]["groups"]
    assert [sorted({"q_proj", "qkv_proj"} & groups[i]["mixer"].keys()) for i in range(8)] == 2 * [
        *[["q_proj"]] * 2,
        *[["qkv_proj"]] * 2,
    ]
    assert groups[2]["mixer"]["qkv_proj"]["bias"].shape[0] == 2
    isolated = Components(components.config)
    isolated.__dict__["model_spec"] = dataclasses.replace(components.model_spec, isolated=True)
    flags = [getattr(module, "isolated", None) for _, module in nnx.iter_modules(isolated.abstract_model)]
    assert flags.count(True) == 4 and False not in flags
    out = jax.eval_shape(components.denoise, params, jnp.ones((1, 4, 4, 1)), jnp.array([3]), jnp.array([0]))
    assert out.shape == (1, 4, 4, 2)


def test_upstreams_format_refuses_other_mixers():
    model = tiny_components(**SMALL, model__mixer="softmax").abstract_model
    with pytest.raises(ValueError, match="unsupported mixer='softmax'; expected 'gla', as in"):
        convert.load_torch_state_dict(model, {})


def test_half_lives_follow_the_grid_and_the_direction():
    assert half_lives(24.0, (8, 12), "row", 3) == 24
    assert half_lives("grid", (8, 12), "row_reversed", 3) == 12
    assert half_lives("grid", (8, 12), "column", 3) == 8
    spread = half_lives("spread", (8, 12), "row", 3)
    np.testing.assert_allclose(spread, (6, 24, 96), rtol=1e-6)
    # The released recipe at 256 pixels and patches of 2.
    assert half_lives("grid", (16, 16), "column", 6) == parse_half_life("16") == DiGOptions.gate_normalizer


def mixed(x, seed=0, **options):
    """The output of a GLA with random parameters."""
    options = {"num_heads": 2, "direction": "column", "implementation": "reference"} | options
    mixer = GatedLinearAttention(32, **options, dtype=jnp.float32, rngs=nnx.Rngs(seed))
    mixer.norm_weight[...] = jnp.linspace(0.5, 2, mixer.norm_weight.shape[0])
    return jax.jit(lambda x: mixer(x, (4, 6)))(x)


def test_equal_half_lives_of_all_heads_are_one_half_life():
    x = jax.random.normal(jax.random.key(0), (2, 24, 32))
    np.testing.assert_allclose(
        mixed(x, gate_normalizer=(24.0, 24.0)), mixed(x, gate_normalizer=24.0), rtol=1e-5, atol=1e-6
    )
    assert np.abs(mixed(x, gate_normalizer=(24.0, 4.0)) - mixed(x, gate_normalizer="grid")).max() > 1e-4


def test_the_mixer_of_one_head_with_expanded_keys_and_values_equals_the_recurrence():
    x = jax.random.normal(jax.random.key(0), (1, 24, 32))
    options = {"gate_normalizer": (5.0, 50.0), "key_expansion": 1.0, "value_expansion": 2.0}
    fast, oracle = (mixed(x, implementation=name, **options) for name in ("xla", "reference"))
    np.testing.assert_allclose(fast, oracle, rtol=1e-4, atol=1e-6)


def test_expansions_set_the_size_of_the_state():
    mixer = blocks_of("DiG-S/2", key_expansion=1.0, num_heads=3)[0]
    made = nnx.eval_shape(lambda: mixer(384, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    assert (made.q_proj.kernel.shape, made.v_proj.kernel.shape) == ((384, 384), (384, 384))
    assert made.norm_weight.shape == (128,) and made.decay_up.kernel.shape == (16, 384)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"tensor": 2}, {"context": 2}])
def test_half_lives_of_heads_are_the_same_on_every_mesh(axes):
    mixer = GatedLinearAttention(
        32, num_heads=2, direction="row", gate_normalizer="spread", dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    graphdef, state = nnx.split(mixer)
    x = jax.random.normal(jax.random.key(0), (2, 24, 32))

    def mix(x):
        return nnx.merge(graphdef, state)(x, (4, 6))

    expected = jax.jit(mix)(x)
    mesh = {f"mesh__{name}": count for name, count in ({"data": 1} | axes).items()}
    with jax.set_mesh(make_mesh(tiny_settings(**mesh).mesh, 2)):
        np.testing.assert_allclose(jax.jit(lambda x: mix(x))(x), expected, rtol=1e-4, atol=1e-6)
