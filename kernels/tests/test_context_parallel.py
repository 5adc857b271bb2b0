import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from pallas_gla import gla, gla_2d

TOKENS = P(None, "context")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))


def sharded(mesh, scan, **options):
    """(o, final_state) of `scan` with T split in four; every shard has the whole states."""
    specs = {"in_specs": (TOKENS,) * 5 + (P(),), "out_specs": (TOKENS, P())}

    @functools.partial(jax.shard_map, mesh=mesh, **specs)
    def local(q, k, v, g, segment_ids, state):
        arrays = {"initial_state": state, "segment_ids": segment_ids if options.get("segments") else None}
        rest = {name: x for name, x in options.items() if name != "segments"}
        return scan(q, k, v, g, **arrays, **rest, return_final_state=True, axis_name="context")

    return local


# The first sequence changes inside shards, the second one exactly between two of them.
SEGMENT_IDS = np.stack([np.repeat([1, 2, 1, 3], [3, 14, 7, 8]), np.repeat([1, 2], [8, 24])]).astype(np.int32)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("segments", [False, True])
def test_split_sequence_equals_the_whole_in_values_and_gradients(mesh, reverse, segments):
    arrays, cotangents = oracle.inputs(0, t=32, h=2, gate="reset_60" if reverse else "strong")

    @jax.jit
    def run(arrays, cotangents):
        scan = sharded(mesh, gla, reverse=reverse, segments=segments)
        out, vjp = jax.vjp(lambda *x: scan(*x[:4], jnp.asarray(SEGMENT_IDS), x[4]), *arrays)
        return (*out, *vjp(cotangents))

    segment_ids = SEGMENT_IDS if segments else None
    expected = oracle.recurrence(arrays, cotangents, reverse=reverse, segment_ids=segment_ids)
    oracle.assert_close(run(arrays, cotangents), expected.values(), 2e-5)


def test_rows_of_a_grid_can_be_split_and_columns_say_that_they_cannot(mesh):
    (*tokens, state), _ = oracle.inputs(1, t=24)
    arrays = (*tokens, jnp.zeros((2, 24), jnp.int32), state)
    o, final_state = sharded(mesh, gla_2d, grid=(2, 3), direction="row_reversed")(*arrays)
    expected = oracle.recurrence((*tokens, state), reverse=True)
    oracle.assert_close([o, final_state], expected.values(), 2e-5, oracle.NAMES[:2])
    with pytest.raises(NotImplementedError, match="direction must be 'row' or 'row_reversed'.*'column'"):
        sharded(mesh, gla_2d, grid=(2, 3), direction="column")(*arrays)


def test_axis_outside_shard_map_is_refused():
    (q, k, v, g, _), _ = oracle.inputs(2)
    with pytest.raises(ValueError, match="axis_name must be a mesh axis .* got 'context'"):
        gla(q, k, v, g, axis_name="context")
