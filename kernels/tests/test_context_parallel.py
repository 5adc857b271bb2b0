import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from pallas_gla import gated_gla_2d, gla, gla_2d

TOKENS = P(None, "context")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(mesh, scan, **options):
    """Return `scan` with T sharded four ways; every shard has the global states."""
    specs = {"in_specs": (TOKENS,) * 5 + (P(),), "out_specs": (TOKENS, P())}

    @functools.partial(jax.shard_map, mesh=mesh, **specs)
    def local(q, k, v, g, segment_ids, state):
        arrays = {"initial_state": state, "segment_ids": segment_ids if options.get("segments") else None}
        rest = {name: x for name, x in options.items() if name != "segments"}
        return scan(q, k, v, g, **arrays, **rest, return_final_state=True, axis_name="context")

    return local


# The first sequence's segments end inside shards, the second one's exactly between two shards.
SEGMENT_IDS = np.stack([np.repeat([1, 2, 1, 3], [3, 14, 7, 8]), np.repeat([1, 2], [8, 24])]).astype(np.int32)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segments", [False, True])
def test_a_sharded_sequence_matches_the_oracle_in_values_and_gradients(mesh, reverse, segments):
    arrays, cotangents = oracle.inputs(0, t=32, h=2, gate="reset_60" if reverse else "strong")

    @jax.jit
    def run(arrays, cotangents):
        scan = sharded(mesh, gla, reverse=reverse, segments=segments)
        out, vjp = jax.vjp(lambda *x: scan(*x[:4], jnp.asarray(SEGMENT_IDS), x[4]), *arrays)
        return (*out, *vjp(cotangents))

    segment_ids = SEGMENT_IDS if segments else None
    expected = oracle.recurrence(arrays, cotangents, reverse=reverse, segment_ids=segment_ids)
    oracle.assert_close(run(arrays, cotangents), expected.values(), 2e-5)


@pytest.mark.parametrize("direction", ["row", "row_reversed", "column", "column_reversed"])
def test_a_grid_with_sharded_rows_matches_the_reference_in_every_direction(mesh, direction):
    # Eight rows of eight columns; each of the four shards has two rows.
    arrays, cotangents = oracle.inputs(1, t=64, h=2, k=8, v=8)
    segment_ids = np.repeat([[1, 2, 3]], [17, 30, 17], axis=1).repeat(2, axis=0).astype(np.int32)

    def run(scan, arrays, cotangents):
        out, vjp = jax.vjp(lambda *x: scan(*x[:4], jnp.asarray(segment_ids), x[4]), *arrays)
        return (*out, *vjp(cotangents))

    run = jax.jit(run, static_argnums=0)
    split = sharded(mesh, gla_2d, grid=(2, 8), direction=direction, segments=True)

    def whole(q, k, v, g, segment_ids, state):
        options = {"segment_ids": segment_ids, "initial_state": state, "return_final_state": True}
        return gla_2d(q, k, v, g, grid=(8, 8), direction=direction, implementation="reference", **options)

    oracle.assert_close(run(split, arrays, cotangents), run(whole, arrays, cotangents), 2e-5)


def test_a_sharded_gated_scan_equals_an_unsharded_one(mesh):
    (q, k, v, logits, _), (gate, _) = oracle.inputs(2, t=64, h=2, k=8, v=8)
    weight = jnp.linspace(0.5, 2, 8)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(TOKENS,) * 5, out_specs=TOKENS)
    def split(*arrays):
        return gated_gla_2d(*arrays, weight, grid=(2, 8), direction="column_reversed", axis_name="context")

    whole = functools.partial(gated_gla_2d, grid=(8, 8), direction="column_reversed")
    arrays = (q, k, v, 16 * logits, gate)
    oracle.assert_close([jax.jit(split)(*arrays)], [whole(*arrays, weight)], 2e-5, ["out"])


@pytest.mark.parametrize("direction", ["row", "row_reversed"])
def test_row_scans_communicate_the_same_for_any_number_of_tokens(mesh, direction):
    def exchanged(rows):
        arrays, cotangents = oracle.inputs(4, t=4 * rows * 8, h=2, k=8, v=8)
        segment_ids = jnp.zeros((2, 4 * rows * 8), jnp.int32)
        scan = sharded(mesh, gla_2d, grid=(rows, 8), direction=direction)

        def run(arrays, cotangents):
            out, vjp = jax.vjp(lambda *x: scan(*x[:4], segment_ids, x[4]), *arrays)
            return (*out, *vjp(cotangents))

        text = jax.jit(run).lower(arrays, cotangents).compile().as_text()
        return sorted(
            re.findall(r" = (.*?) (all-[a-z-]+?|reduce-scatter|collective-permute)(?:-start)?\(", text)
        )

    assert exchanged(2) == exchanged(8) != []


def test_columns_that_the_axis_size_does_not_divide_raise(mesh):
    (*tokens, state), _ = oracle.inputs(3, t=24)
    arrays = (*tokens, jnp.zeros((2, 24), jnp.int32), state)
    with pytest.raises(
        ValueError, match="axis_name='context': got 3 columns; expected a multiple of the axis size, 4"
    ):
        sharded(mesh, gla_2d, grid=(2, 3), direction="column")(*arrays)


def test_an_axis_outside_shard_map_raises():
    (q, k, v, g, _), _ = oracle.inputs(2)
    with pytest.raises(ValueError, match="invalid axis_name: got 'context'; expected a mesh axis of"):
        gla(q, k, v, g, axis_name="context")
