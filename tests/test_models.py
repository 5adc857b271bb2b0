import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dig_jax import create_model
from dig_jax.models.blocks import DepthwiseConv
from dig_jax.models.embeddings import patchify, sincos_positions, unpatchify

TINY = {"hidden_size": 32, "num_heads": 1}


def tiny(name="DiG-S/2", *, depth=4, input_size=8, num_classes=10, seed=0, **overrides):
    return create_model(
        name,
        input_size=input_size,
        num_classes=num_classes,
        rngs=nnx.Rngs(seed),
        depth=depth,
        **TINY | overrides,
    )


def awake(model, seed=1):
    """The model with random values in place of all zeros, so that every part shows in its output."""
    graphdef, state = nnx.split(model)
    random = np.random.default_rng(seed)

    def drawn(leaf):
        return jnp.asarray(leaf + 0.1 * random.standard_normal(leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree.map(drawn, jax.device_get(state)))


@functools.cache
def inputs(height=8, width=8, batch=2, channels=4):
    x = jax.random.normal(jax.random.key(7), (batch, height, width, channels))
    return x, jnp.array([17, 803]), jnp.array([3, 9])


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("DiG-S/2", {}, 32_983_328),
        ("DiG-B/2", {}, 130_551_584),
        ("DiG-L/2", {}, 464_760_352),
        ("DiG-XL/2", {}, 675_659_040),
        ("DiG-S/2", {"skip": "linear"}, 34_459_808),
        ("DiG-XL/2", {"skip": "identity"}, 710_178_720),
        ("DiT-XL/2", {}, 674_834_720),
    ],
)
def test_parameter_counts_are_the_published_ones(name, overrides, expected):
    make = functools.partial(create_model, name, input_size=32, num_classes=1000, **overrides)
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == expected


def test_a_new_model_predicts_zero_and_its_blocks_are_the_identity():
    model = tiny()
    x, t, y = inputs()
    np.testing.assert_array_equal(model(x, t, y), 0)
    tokens = jax.random.normal(jax.random.key(0), (2, 16, 32))
    out = model.blocks(tokens, jnp.ones((2, 32)), (4, 4))
    np.testing.assert_array_equal(out, tokens)


@pytest.mark.parametrize("name", ["DiG-S/2", "DiT-S/2"])
def test_non_square_inputs_give_outputs_of_their_shape(name):
    model = awake(tiny(name, input_size=(4, 12), num_classes=0, in_channels=3, learn_sigma=False))
    out = model(jnp.ones((2, 4, 12, 3)), jnp.array([0.5, 999.0]))
    assert out.shape == (2, 4, 12, 3)
    assert out.dtype == jnp.float32
    assert float(jnp.abs(out).min()) > 0


def test_each_token_keeps_its_place_through_all_directions_on_a_non_square_grid():
    """Without convolution, a change of the last token met by all four scans reaches nobody before it."""
    model = awake(tiny(input_size=(8, 12), directions=1, conv=None, num_classes=0))
    x = jax.random.normal(jax.random.key(3), (1, 8, 12, 4))
    changed = x.at[:, 6:, 10:].add(1.0)  # the last token in raster order
    t = jnp.array([5])
    difference = jnp.abs(model(changed, t) - model(x, t)).max((0, 3))
    assert difference[6:, 10:].min() > 0
    assert difference[:6].max() == 0
    assert difference[:, :10].max() == 0


def test_reversed_scan_is_causal_from_the_last_token_on():
    model = awake(tiny(depth=2, input_size=(8, 12), directions=2, conv=None, num_classes=0))
    x = jax.random.normal(jax.random.key(3), (1, 8, 12, 4))
    t = jnp.array([5])
    for corner in (x.at[:, :2, :2], x.at[:, 6:, 10:]):
        difference = jnp.abs(model(corner.add(1.0), t) - model(x, t)).max((0, 3))
        assert difference.min() > 0  # forward and reverse together reach everything


@functools.cache
@functools.cache
def loss_and_gradient(remat, skip):
    x, t, y = inputs(height=4, width=4)
    depth = 8 if skip else 5  # groups of four, and blocks outside of them
    graphdef, params = nnx.split(awake(tiny(depth=depth, input_size=4, skip=skip, remat=remat)))

    def loss(params):
        return jnp.square(nnx.merge(graphdef, params)(x, t, y)).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    ("remat", "skip"),
    [("dots", None), ("full", None), pytest.param("full", "linear", marks=pytest.mark.slow)],
)
def test_rematerialisation_changes_neither_output_nor_gradient(remat, skip):
    def assert_close(actual, expected):
        # The norm of a head's first outputs cancels what of their gradient is larger: rounding is amplified.
        assert jnp.linalg.norm(actual - expected) <= 1e-3 * jnp.linalg.norm(expected)

    jax.tree.map(assert_close, loss_and_gradient(None, skip), loss_and_gradient(remat, skip))


@pytest.mark.parametrize("depth", [pytest.param(8, marks=pytest.mark.slow), 12, 6])
def test_skips_join_the_outputs_that_they_should_whether_scanned_or_not(depth):
    """Against a plain loop over single blocks, for depths with and without whole groups."""
    model = awake(tiny(depth=depth, skip="linear"))
    stack, grid = model.blocks, (4, 4)
    tokens, c = jax.random.normal(jax.random.key(0), (2, 16, 32)), jnp.ones((2, 32))

    def block(index):
        if index >= depth // 4 * 4:
            return stack.rest[index % 4]
        graphdef, params = nnx.split(stack.groups[index % 4])
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index // 4], params))

    x, stored = tokens, []
    graphdef, skip_params = nnx.split(stack.skips)
    for index in range(depth):
        if index > depth // 2:
            params = jax.tree.map(lambda leaf, index=index: leaf[index - depth // 2 - 1], skip_params)
            x = nnx.merge(graphdef, params)(jnp.concatenate([x, stored.pop()], -1))
        x = block(index)(x, c, grid)
        if index < depth // 2 - 1:
            stored.append(x)
    np.testing.assert_allclose(stack(tokens, c, grid), x, rtol=2e-4, atol=2e-5)


def test_identity_skips_start_as_if_there_were_none():
    tokens = jax.random.normal(jax.random.key(0), (1, 16, 32))
    out = tiny(depth=8, skip="identity").blocks(tokens, jnp.ones((1, 32)), (4, 4))
    np.testing.assert_allclose(out, tokens, rtol=1e-6)


def test_the_null_class_is_y_none_drop_and_the_last_index():
    model = awake(tiny())
    x, t, y = inputs()
    null = model(x, t, None)
    np.testing.assert_array_equal(null, model(x, t, jnp.full(2, 10)))
    np.testing.assert_array_equal(null, model(x, t, y, drop=jnp.array([True, True])))
    one = model(x, t, y, drop=jnp.array([True, False]))
    np.testing.assert_array_equal(one[0], null[0])
    assert jnp.abs(one[1] - null[1]).max() > 0


def test_bfloat16_activations_keep_parameters_and_output_in_float32():
    x, t, y = inputs()
    full, half = awake(tiny()), awake(tiny(dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype(jnp.float32)}
    out, expected = half(x, t, y), full(x, t, y)
    assert out.dtype == jnp.float32
    error = jnp.sqrt(jnp.square(out - expected).mean() / jnp.square(expected).mean())
    assert 0 < error < 0.05


def test_patchify_is_undone_by_unpatchify_and_orders_rows_columns_channels():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3).astype(jnp.float32)
    tokens = patchify(x, 2)
    np.testing.assert_array_equal(tokens[1, 4].reshape(2, 2, 3), x[1, 2:4, 2:4])
    np.testing.assert_array_equal(unpatchify(tokens, (2, 3), 2), x)


def test_positions_encode_the_column_first_and_then_the_row():
    table = sincos_positions((3, 5), 8).reshape(3, 5, 8)
    np.testing.assert_array_equal(table[0, :, :4], table[2, :, :4])
    np.testing.assert_array_equal(table[:, 0, 4:], table[:, 4, 4:])
    np.testing.assert_allclose(table[0, 1, :2], np.sin([1.0, 0.01]), rtol=1e-6)


def test_depthwise_conv_is_the_grouped_convolution():
    conv = DepthwiseConv(8, dtype=jnp.float32)
    conv.kernel[...] = jax.random.normal(jax.random.key(0), (3, 3, 8))
    conv.bias[...] = jnp.arange(8.0)
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, 8))
    expected = jax.lax.conv_general_dilated(
        x,
        conv.kernel[...][:, :, None],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=8,
    )
    out = conv(x.reshape(2, 24, 8), (4, 6)).reshape(x.shape)
    np.testing.assert_allclose(out, expected + jnp.arange(8.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "DiG-M/2"}, "unknown model 'DiG-M/2'; did you mean 'DiG-"),
        ({"name": "DiG-S"}, "unknown model 'DiG-S'; did you mean 'DiG-S/2'"),
        ({"input_size": 9}, "input height 9 is not a multiple of patch_size=2"),
        ({"input_size": (8, 7)}, "input width 7 is not a multiple of patch_size=2"),
        ({"num_heads": 3}, "num_heads=3 does not divide"),
        ({"name": "DiT-S/2", "num_heads": 3}, "num_heads=3 does not divide"),
        ({"detph": 4}, "no option 'detph'; did you mean 'depth'"),
        ({"directions": 3}, "directions=3 is none of 4, 2, 1"),
        ({"depth": -1}, "depth=-1 is not positive"),
        ({"skip": "linear", "depth": 7}, "needs an even depth"),
        ({"skip": "linear", "skip_alignment": "upstream", "depth": 6}, "multiple of 4"),
        ({"skip": "linear", "skip_alignment": "upstream", "input_size": (8, 4)}, "square"),
        ({"num_classes": -1}, "num_classes=-1 is negative"),
    ],
)
def test_what_does_not_fit_together_is_named(changes, message):
    arguments = {"name": "DiG-S/2", "input_size": 8, "num_classes": 10, "depth": 4, **TINY} | changes
    with pytest.raises(ValueError, match=message):
        create_model(rngs=nnx.Rngs(0), **arguments)


def test_an_image_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not divided by patch_size=2"):
        tiny()(jnp.ones((1, 8, 7, 4)), jnp.array([1]))
