import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_options import unoptimized

from dig_jax import create_model
from dig_jax.models import registry
from dig_jax.models.block_stack import BlockPattern, BlockStack, plan_segments
from dig_jax.models.blocks import BlockSpec
from dig_jax.models.embeddings import patchify, sincos_positions, unpatchify
from dig_jax.models.layers import DepthwiseConv, GeluMLP, SwiGLU
from dig_jax.models.mixers import GatedLinearAttention, SoftmaxAttention
from dig_jax.models.options import ModelOptions

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


def randomized(module, seed=1):
    """The graphdef, and parameters without zeros, so that every layer affects the output."""
    graphdef, state = nnx.split(module)
    random = np.random.default_rng(seed)

    def drawn(leaf):
        return jnp.asarray(leaf + 0.1 * random.standard_normal(leaf.shape), leaf.dtype)

    return graphdef, jax.tree.map(drawn, jax.device_get(state))


@functools.partial(jax.jit, static_argnums=0, static_argnames="grid")
def apply(graphdef, params, *args, **kwargs):
    """Call a module; models with equal options share one program."""
    return nnx.merge(graphdef, params)(*args, **kwargs)


def inputs(height=8, width=8, channels=4):
    x = jax.random.normal(jax.random.key(7), (2, height, width, channels))
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
    model = tiny(depth=1)
    np.testing.assert_array_equal(apply(*nnx.split(model), *inputs()), 0)
    tokens = jax.random.normal(jax.random.key(0), (2, 16, 32))
    out = apply(*nnx.split(model.blocks), tokens, jnp.ones((2, 32)), grid=(4, 4))
    np.testing.assert_array_equal(out, tokens)


def test_an_input_size_may_be_a_number_of_numpy():
    assert nnx.split(tiny(input_size=np.int64(8)))[0] == nnx.split(tiny(input_size=8))[0]


@pytest.mark.parametrize("name", ["DiG-S/2", "DiT-S/2"])
def test_non_square_inputs_give_outputs_of_their_shape(name):
    model = tiny(name, depth=1, input_size=(4, 12), num_classes=0, in_channels=3, learn_sigma=False)
    out = apply(*randomized(model), jnp.ones((2, 4, 12, 3)), jnp.array([0.5, 999.0]))
    assert out.shape == (2, 4, 12, 3)
    assert out.dtype == jnp.float32
    assert float(jnp.abs(out).min()) > 0


def test_a_forward_scan_without_convolution_is_causal_on_a_non_square_grid():
    model = tiny(depth=2, input_size=(8, 12), directions=1, conv=None, num_classes=0)
    x = jax.random.normal(jax.random.key(3), (1, 8, 12, 4))
    changed = x.at[:, 6:, 10:].add(1.0)  # the last token in raster order
    out = apply(*randomized(model), jnp.concatenate([x, changed]), jnp.array([5, 5]))
    difference = jnp.abs(out[1] - out[0]).max(-1)
    assert difference[6:, 10:].min() > 1e-4
    # The two images of a batch may round differently.
    assert difference[:6].max() <= 1e-6
    assert difference[:, :10].max() <= 1e-6


def test_a_forward_and_a_reversed_scan_together_reach_every_token():
    model = tiny(depth=2, input_size=(8, 12), directions=2, conv=None, num_classes=0)
    x = jax.random.normal(jax.random.key(3), (1, 8, 12, 4))
    first, last = x.at[:, :2, :2].add(1.0), x.at[:, 6:, 10:].add(1.0)
    out = apply(*randomized(model), jnp.concatenate([x, first, last]), jnp.array([5, 5, 5]))
    assert jnp.abs(out[1:] - out[0]).max(-1).min() > 0


def hybrid_blocks(*, num_heads=1):
    """A pattern of two mixers, MLPs, norms and convolutions that differ."""
    # The reference implementation compiles fast.
    gla = functools.partial(
        GatedLinearAttention, num_heads=num_heads, direction="column_reversed", implementation="reference"
    )
    softmax = functools.partial(SoftmaxAttention, num_heads=num_heads)
    swiglu, gelu = (functools.partial(mlp, hidden=48) for mlp in (SwiGLU, GeluMLP))
    return BlockSpec(gla, swiglu, conv="inside", norm="rms"), BlockSpec(softmax, gelu, conv="after")


def plain_block():
    """A block that compiles fast."""
    mlp = functools.partial(GeluMLP, hidden=48)
    return BlockSpec(functools.partial(SoftmaxAttention, num_heads=1), mlp)


def unrolled(stack, x, c, grid):
    """The outputs of a stack by a plain loop over single blocks."""
    depth, period = stack.depth, stack.period

    def layer(module, index):
        graphdef, params = nnx.split(module)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], params))

    stored = []
    for index in range(depth):
        if stack.skips is not None and index > depth // 2:
            join = layer(stack.skips, index - depth // 2 - 1)
            x = join(jnp.concatenate([x, stored.pop()], axis=-1))
        position, is_rest = index % period, index >= depth // period * period
        block = stack.rest[position] if is_rest else layer(stack.groups[position], index // period)
        x = block(x, c, grid)
        if index < depth // 2 - 1:
            stored.append(x)
    return x


@functools.cache
def value_and_gradient(depth, skip, remat, run=BlockStack.__call__, scan_layers=True):
    blocks = hybrid_blocks() if skip is None else (plain_block(),) * 2
    pattern = BlockPattern(blocks, skip=skip)
    options = {"depth": depth, "remat": remat, "scan_layers": scan_layers}
    stack = BlockStack(pattern, width=32, **options, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, params = randomized(stack)
    x, c = jax.random.normal(jax.random.key(0), (1, 6, 32)), jnp.ones((1, 32))

    def loss(params, x):
        out = run(nnx.merge(graphdef, params), x, c, (2, 3))
        return jnp.square(out).mean(), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return out, gradients


# Depth 5, of two mixers: two groups and a remaining block. Depth 12: every kind of segment.
@pytest.mark.parametrize(
    ("depth", "skip", "remat"),
    [
        (5, None, "dots"),
        (12, "linear", "block"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((5, None, None), (5, None, "full"), (12, "linear", None), (12, "linear", "full"))
        ),
    ],
)
def test_a_scanned_stack_equals_a_loop_over_its_blocks_in_output_and_gradient(depth, skip, remat):
    def assert_close(actual, expected):
        assert jnp.linalg.norm(actual - expected) <= 1e-3 * jnp.linalg.norm(expected)

    expected = value_and_gradient(depth, skip, None, run=unrolled)
    jax.tree.map(assert_close, value_and_gradient(depth, skip, remat), expected)


def test_without_scan_layers_a_step_has_no_loop_over_layers_and_the_same_result():
    def assert_close(actual, expected):
        assert jnp.linalg.norm(actual - expected) <= 1e-4 * jnp.linalg.norm(expected)

    for remat in (None, "block"):
        repeated = value_and_gradient(5, None, remat, scan_layers=False)
        jax.tree.map(assert_close, repeated, value_and_gradient(5, None, None))
    loops = {}
    for scan_layers in (True, False):
        options = {"depth": 4, "dtype": jnp.float32, "rngs": nnx.Rngs(0), "scan_layers": scan_layers}
        stack = BlockStack(BlockPattern((plain_block(),)), width=32, **options)
        x, c = jnp.ones((1, 6, 32)), jnp.ones((1, 32))
        text = jax.jit(functools.partial(stack, grid=(2, 3))).lower(x, c).as_text()
        loops[scan_layers] = text.count("stablehlo.while")
    assert loops == {True: 1, False: 0}


def test_a_family_with_two_mixers_is_one_registry_row(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class HybridOptions(ModelOptions):
        def pattern(self, level):
            return BlockPattern(hybrid_blocks(num_heads=self.heads_at(level)))

    row = registry.Family("Hybrid", HybridOptions, {"T": registry.Size(3, 32, 1)})
    monkeypatch.setitem(registry.FAMILIES, "Hybrid", row)
    make = functools.partial(create_model, "Hybrid-T/4", input_size=8, num_classes=10)
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert apply.eval_shape(*nnx.split(model), *inputs()).shape == (2, 8, 8, 8)
    fields = {field.name for field in dataclasses.fields(ModelOptions)}
    assert registry.accepted_options("Hybrid-T/4") == fields


@pytest.mark.parametrize("period", [1, 2, 4, 6])
@pytest.mark.parametrize("long_skips", [False, True])
def test_segments_cover_all_blocks_once_and_stay_few(period, long_skips):
    sizes = {}
    for depth in range(4, 60, 2):
        segments = plan_segments(depth, period, long_skips=long_skips)
        stored, blocks = [], []
        for segment in segments:
            indices = np.arange(segment.start, segment.start + segment.num_blocks)
            blocks.extend(indices)
            if segment.skip == "store":
                stored.append((segment, indices))
            if segment.skip == "join":
                source, sources = stored.pop()
                assert (source.size, source.repeats) == (segment.size, segment.repeats)
                np.testing.assert_array_equal(sources, depth - 1 - indices[::-1])
        assert not stored
        assert blocks == list(range(depth))
        skips = [segment.num_blocks for segment in segments if segment.skip == "join"]
        assert sum(skips) == (depth // 2 - 1 if long_skips else 0)
        sizes[depth] = sum(segment.size for segment in segments)
    assert max(sizes.values()) <= 8 * period


def test_the_program_of_long_skips_does_not_grow_with_the_depth():
    def length(depth):
        pattern = BlockPattern((plain_block(),), skip="linear")
        make = functools.partial(BlockStack, pattern, width=32, depth=depth, dtype=jnp.float32)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        x, c = jax.ShapeDtypeStruct((1, 6, 32), jnp.float32), jax.ShapeDtypeStruct((1, 32), jnp.float32)
        return len(apply.lower(graphdef, params, x, c, grid=(2, 3)).as_text())

    assert length(28) < 1.02 * length(12)


def test_identity_skips_start_as_if_there_were_none():
    tokens = jax.random.normal(jax.random.key(0), (1, 6, 32))
    pattern = BlockPattern((plain_block(),), skip="identity")
    stack = BlockStack(pattern, width=32, depth=6, dtype=jnp.float32, rngs=nnx.Rngs(0))
    out = apply(*nnx.split(stack), tokens, jnp.ones((1, 32)), grid=(2, 3))
    np.testing.assert_allclose(out, tokens, rtol=1e-6)


def test_upstream_alignment_rejects_non_square_images_when_called():
    make = functools.partial(tiny, skip="linear", skip_alignment="upstream")
    with pytest.raises(ValueError, match="invalid input 8×4 with .*; expected a square"):
        nnx.eval_shape(make)(jnp.ones((1, 8, 4, 4)), jnp.array([1]))


def test_the_null_class_is_y_none_drop_and_the_last_index():
    model = randomized(tiny("DiT-S/2", depth=1))
    x, t, y = inputs()
    null = apply(*model, x, t, None)
    np.testing.assert_array_equal(null, apply(*model, x, t, jnp.full(2, 10)))
    np.testing.assert_array_equal(null, apply(*model, x, t, y, drop=jnp.array([True, True])))
    one = apply(*model, x, t, y, drop=jnp.array([True, False]))
    np.testing.assert_array_equal(one[0], null[0])
    assert jnp.abs(one[1] - null[1]).max() > 0


def test_bfloat16_activations_keep_parameters_and_output_in_float32():
    full, half = randomized(tiny(depth=1)), randomized(tiny(depth=1, dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(half[1])} == {jnp.dtype(jnp.float32)}
    out, expected = apply(*half, *inputs()), apply(*full, *inputs())
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


def test_interpolated_positions_spread_a_grid_over_another_one():
    np.testing.assert_array_equal(sincos_positions((3, 5), 8, (3, 5)), sincos_positions((3, 5), 8))
    fine = sincos_positions((6, 5), 8, (3, 5)).reshape(6, 5, 8)
    rows = (np.arange(6) + 0.5) / 2 - 0.5
    np.testing.assert_allclose(fine[:, 2, 4], np.sin(rows), rtol=1e-6)
    np.testing.assert_array_equal(fine[0, :, :4], sincos_positions((3, 5), 8).reshape(3, 5, 8)[0, :, :4])


def test_positions_matter_only_for_images_of_another_size():
    models = [tiny(depth=1, positions=positions) for positions in ("absolute", "interpolated")]
    nnx.update(models[1], nnx.state(models[0]))
    for size, equal in ((8, True), (16, False)):
        x, t = jnp.ones((1, size, size, 4)), jnp.array([3])
        tokens = [model.outputs(x, t, taps=(0,)).hidden[0] for model in models]
        assert np.array_equal(*tokens) == equal


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
    out = apply(*nnx.split(conv), x.reshape(2, 24, 8), grid=(4, 6)).reshape(x.shape)
    np.testing.assert_allclose(out, expected + jnp.arange(8.0), rtol=1e-5, atol=1e-5)


def test_an_mlp_in_parts_has_the_outputs_and_gradients_of_a_whole_one():
    """16 tokens in 3 parts."""

    def values_and_gradients(**options):
        graphdef, params = randomized(tiny("DiT-S/2", depth=1, mlp_hidden_size=32, **options))
        loss = jax.jit(jax.value_and_grad(lambda p: jnp.square(nnx.merge(graphdef, p)(*inputs())).mean()))
        return loss(params)

    with unoptimized():
        whole, parts = values_and_gradients(), values_and_gradients(mlp_parts=3)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), parts, whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "DiG-M/2"}, "unknown model 'DiG-M/2'; did you mean 'Di[GS]-"),
        ({"name": "DiG-S"}, "unknown model 'DiG-S'; did you mean 'DiG-S/2'"),
        ({"input_size": 9}, "input height 9; expected a multiple of patch_size=2"),
        ({"input_size": (8, 7)}, "input width 7; expected a multiple of patch_size=2"),
        ({"num_heads": 3}, "num_heads=3; expected a divisor of the key width 16"),
        ({"name": "DiT-S/2", "num_heads": 3}, "num_heads=3; expected a divisor of hidden_size=32"),
        ({"detph": 4}, "unknown option 'detph' of DiG; did you mean 'depth'"),
        ({"name": "DiT-S/2", "skip": "linear"}, "unknown option 'skip' of DiT"),
        ({"options": {}}, "unknown option 'options' of DiG"),
        ({"directions": 3}, "directions=3; expected one of 4, 2, 1"),
        ({"conv": "before"}, "conv='before'; expected one of after, inside, None"),
        ({"norm": None}, "norm=None; expected one of layer, rms"),
        ({"skip": "dense"}, "skip='dense'; expected one of linear, identity, None"),
        ({"remat": "none"}, "remat='none'; expected one of dots, full, block, None"),
        ({"depth": -1}, "depth=-1; expected a positive number"),
        ({"mlp_parts": 0}, "mlp_parts=0; expected a positive number"),
        ({"hidden_size": 34}, "hidden_size=34; expected a multiple of 4"),
        ({"skip": "linear", "depth": 7}, "depth=7 with long skips; expected an even depth"),
        ({"skip": "linear", "skip_alignment": "upstream", "depth": 6}, "multiple of 4"),
        (
            {"skip": "linear", "skip_alignment": "upstream", "input_size": (8, 4)},
            "invalid input 8×4 with .*; expected a square",
        ),
        ({"num_classes": -1}, "num_classes=-1; expected 0"),
    ],
)
def test_invalid_options_raise_errors_that_name_them(changes, message):
    arguments = {"name": "DiG-S/2", "input_size": 8, "num_classes": 10, "depth": 4, **TINY} | changes
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: create_model(rngs=nnx.Rngs(0), **arguments))


def test_none_keeps_a_size_of_the_named_model():
    model = nnx.eval_shape(lambda: tiny(depth=None, hidden_size=None, num_heads=None, patch_size=None))
    assert (model.options.depth, model.options.hidden_size) == (12, 384)
    assert (model.options.num_heads, model.options.patch_size) == (6, 2)


def test_an_image_that_the_patch_does_not_divide_is_rejected():
    with pytest.raises(ValueError, match="input width 7; expected a multiple of patch_size=2"):
        nnx.eval_shape(tiny)(jnp.ones((1, 8, 7, 4)), jnp.array([1]))
