import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dig_jax import convert
from dig_jax.errors import ConfigError
from dig_jax.models.block_stack import BlockPattern, BlockStack, plan_segments
from dig_jax.models.blocks import BlockSpec
from dig_jax.models.layers import GeluMLP
from dig_jax.models.mixers import SoftmaxAttention
from dig_jax.parallel import distribute, make_mesh, state_sharding
from dig_jax.testing import random_params, tiny_components, tiny_settings

SIZE, WIDTH, GRID = 4, 16, (2, 3)


def stack(depth, *, period=2, skip=None, scan_layers=True):
    block = BlockSpec(functools.partial(SoftmaxAttention, num_heads=1), functools.partial(GeluMLP, hidden=16))
    pattern = BlockPattern((block,) * period, skip=skip)
    return BlockStack(
        pattern, width=WIDTH, depth=depth, dtype=jnp.float32, rngs=nnx.Rngs(0), scan_layers=scan_layers
    )


def randomized(module):
    graphdef, params = nnx.split(module)
    random = np.random.default_rng(1)
    draw = lambda leaf: jnp.float32(leaf + 0.2 * random.standard_normal(leaf.shape))  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(draw, params))


def by_loop(stack, x, c):
    """The output of every block by a plain loop."""

    def layer(module, index):
        graphdef, params = nnx.split(module)
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], params))

    outputs = []
    for index in range(stack.depth):
        if stack.skips is not None and index > stack.depth // 2:
            join = layer(stack.skips, index - stack.depth // 2 - 1)
            x = join(jnp.concatenate([x, outputs[stack.depth - 1 - index]], axis=-1))
        number, position = divmod(index, stack.period)
        is_rest = number == stack.depth // stack.period
        x = (stack.rest[position] if is_rest else layer(stack.groups[position], number))(x, c, GRID)
        outputs.append(x)
    return outputs


@pytest.mark.parametrize(("depth", "skip"), [(7, None), (12, "linear")])
def test_every_tapped_block_gives_its_output_and_changes_no_other(depth, skip):
    """All blocks at once and a few pairs, with a remainder and with every kind of segment of long skips."""
    module = randomized(stack(depth, skip=skip))
    x, c = jax.random.normal(jax.random.key(0), (1, 6, WIDTH)), jnp.ones((1, WIDTH))
    run = nnx.jit(lambda module, x, c, taps: module.run(x, c, GRID, taps)[:2], static_argnums=3)
    expected = nnx.jit(by_loop)(module, x, c)
    for taps in [tuple(range(depth)), (2, 4)]:
        out, hidden = run(module, x, c, taps)
        np.testing.assert_allclose(out, expected[-1], rtol=1e-4, atol=1e-5)
        assert sorted(hidden) == sorted(taps)
        for block, tokens in hidden.items():
            np.testing.assert_allclose(tokens, expected[block], rtol=1e-4, atol=1e-5, err_msg=str(block))


@pytest.mark.parametrize("period", [1, 2, 4])
@pytest.mark.parametrize("long_skips", [False, True])
def test_cut_segments_cover_all_blocks_once_and_end_at_the_cuts(period, long_skips):
    for depth in range(4, 24, 2):
        segments = plan_segments(depth, period, long_skips=long_skips)
        ranges = [range(segment.start, segment.start + segment.num_blocks) for segment in segments]
        assert list(itertools.chain(*ranges)) == list(range(depth))
        for segment, inside in zip(segments, ranges, strict=True):
            for cuts in [(), *((i,) for i in range(depth)), (1, 2), range(depth)]:
                pieces = list(segment.after(cuts))
                ends = [piece.start + piece.num_blocks - 1 for piece in pieces]
                blocks = [i for piece in pieces for i in range(piece.start, piece.start + piece.num_blocks)]
                assert blocks == list(inside)
                assert {cut for cut in cuts if cut in inside} <= set(ends)
                assert len(pieces) <= 1 + 3 * len(set(cuts) & set(inside))
                assert cuts or pieces == [segment]


def test_taps_keep_layers_scanned_and_store_one_blocks_tokens():
    """The program has the same length at every depth, and no array of all blocks' outputs."""
    sizes, x, c = {}, jnp.ones((3, 6, WIDTH)), jnp.ones((3, WIDTH))
    for depth in (16, 32):
        module = nnx.eval_shape(lambda depth=depth: stack(depth, period=4))
        run = lambda module, x, c: module.run(x, c, GRID, (5,))  # noqa: E731
        text = nnx.jit(run).lower(module, x, c).as_text()
        assert text.count("stablehlo.while") == 2
        assert not re.search(rf"tensor<\d+x3x6x{WIDTH}xf32>", text)
        sizes[depth] = len(text)
    assert sizes[32] < 1.02 * sizes[16]


def test_the_internal_head_is_one_more_layer_and_leaves_the_rest_as_it_was():
    plain, headed = (
        tiny_components(model__name="DiT-S/2", model__depth=3, model__internal_head=head) for head in (0, 1)
    )
    params, both = (jax.jit(components.init_params)(jax.random.key(0)) for components in (plain, headed))
    assert both.keys() - params.keys() == {"internal"}
    jax.tree.map(np.testing.assert_array_equal, {name: both[name] for name in params}, params)

    params = random_params(headed)
    x, t, y = jnp.ones((2, 4, 4, 1)), jnp.array([3, 900]), jnp.array([0, 4])
    outputs = jax.jit(functools.partial(headed.model_spec.outputs, taps=(1,)))(params, x, t, y)
    assert outputs.internal is not None
    shape = outputs.output.shape
    assert outputs.internal.shape == shape and outputs.hidden[1].shape == (2, 4, 32)
    only_network = {name: part for name, part in params.items() if name != "internal"}
    for components, weights in [(plain, only_network), (headed, params)]:
        output = jax.jit(components.denoise)(weights, x, t, y)
        np.testing.assert_allclose(output, outputs.output, rtol=1e-4, atol=1e-5)
    assert not np.allclose(outputs.internal, outputs.output)
    assert jax.eval_shape(plain.model_spec.outputs, only_network, x, t, y).internal is None


@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 4}, {"data": 2, "tensor": 2}])
def test_internal_outputs_are_the_same_on_every_mesh(axes):
    components = tiny_components(
        model__name="DiT-S/2", model__depth=3, model__num_heads=2, model__internal_head=1
    )
    params, images = random_params(components), np.ones((SIZE, 4, 4, 1), np.float32)
    batch = {"x": images, "t": np.arange(SIZE, dtype=np.float32), "y": np.arange(SIZE, dtype=np.int32)}

    def outputs(params, batch):
        return components.model_spec.outputs(params, batch["x"], batch["t"], batch["y"], taps=(0,))

    expected = jax.jit(outputs)(params, batch)
    mesh = make_mesh(
        tiny_settings(**{f"mesh__{axis}": count for axis, count in ({"data": 1} | axes).items()}).mesh, SIZE
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, state_sharding(params, mesh)), distribute(batch, mesh)
        got = jax.jit(lambda *inputs: outputs(*inputs))(*placed)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_blocks_that_do_not_exist_are_rejected():
    components = tiny_components(model__depth=2)
    params, images, numbers = random_params(components), jnp.ones((1, 4, 4, 1)), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match=r"block out of range: got 2; expected 0 … 1"):
        components.model_spec.outputs(params, images, numbers, numbers, taps=(2,))
    flags = "no internal head: --config.model.internal_head=0 --config.sampling.internal_guidance_scale=1"
    for depth, expected in ((2, flags), (4, f"at most 2, or {flags}")):
        components = tiny_components(model__depth=depth, model__internal_head=3)
        message = f"invalid internal_head=3 for depth={depth}; expected {expected}"
        with pytest.raises(ConfigError, match=message):
            components.init_params(jax.random.key(0))


def test_upstreams_format_refuses_a_model_with_an_internal_head():
    model = tiny_components(model__depth=4, model__internal_head=1).abstract_model
    with pytest.raises(ValueError, match="unsupported internal_head=1; expected None"):
        convert.load_torch_state_dict(model, {})
