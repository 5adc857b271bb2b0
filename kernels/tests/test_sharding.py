import functools
import re

import jax
import jax.numpy as jnp
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from pallas_gla import gated_gla_2d, gla

AUTO = (AxisType.Auto, AxisType.Auto)
EXPLICIT = (AxisType.Explicit, AxisType.Explicit)
NAMES = ["dq", "dk", "dv", "dlogits", "dgate", "dweight"]
GRID = {"grid": (4, 5), "direction": "column"}


def arrays_and_gradient():
    """Return the arrays of a gated scan (B = 4, H = 2) and the function that computes their gradients."""
    (q, k, v, logits, _), (gate, _) = oracle.inputs(0, b=4, h=2)

    def loss(q, k, v, logits, gate, weight):
        return jnp.sum(jnp.sin(gated_gla_2d(q, k, v, logits, gate, weight, **GRID)))

    return (q, k, v, logits, gate, jnp.linspace(0.5, 2, v.shape[-1])), jax.grad(loss, argnums=range(6))


@pytest.mark.parametrize("types", [AUTO, EXPLICIT], ids=["auto", "explicit"])
@pytest.mark.parametrize("axes", [("data", "tensor"), ("fsdp", "model")])
def test_sharding_batch_and_heads_equals_one_device_and_gathers_nothing(types, axes):
    mesh = jax.make_mesh((2, 2), axes, axis_types=types)
    arrays, gradient = arrays_and_gradient()
    expected = jax.jit(gradient)(*arrays)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, P(axes[0], None, axes[1]))) for x in arrays[:5]]
        compiled = jax.jit(gradient).lower(*split, arrays[5]).compile()
        oracle.assert_close(compiled(*split, arrays[5]), expected, 1e-5, NAMES)
    # Only the weight's gradient, a sum over the devices, is communicated.
    collective = r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    exchanged = {shape.partition("{")[0] for shape in re.findall(collective, compiled.as_text())}
    assert exchanged <= {"f32[16]", "f32[2,16]", "f32[4,16]"}


def test_sizes_that_a_mesh_does_not_divide_run_unsharded():
    arrays, _ = oracle.inputs(1, b=3, h=3)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=AUTO)
    expected = gla(*arrays[:4])
    with jax.set_mesh(mesh):
        oracle.assert_close([jax.jit(gla)(*arrays[:4])], [expected], 1e-6, ["o"])


def test_auto_axes_inside_a_shard_map_still_shard_the_batch():
    (q, k, v, g, _), _ = oracle.inputs(2, b=4, t=32)
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=AUTO)
    expected = gla(q, k, v, g)
    with jax.set_mesh(mesh):
        scan = functools.partial(gla, axis_name="context")
        tokens = P(None, "context")
        split = jax.shard_map(scan, in_specs=(tokens,) * 4, out_specs=tokens, axis_names={"context"})
        oracle.assert_close([jax.jit(split)(q, k, v, g)], [expected], 1e-5, ["o"])


def test_vmap_and_sharding_combine():
    arrays, _ = oracle.inputs(3, b=4)
    q, k, v, g = (jnp.stack([x, 2 * x]) for x in arrays[:4])
    expected = jnp.stack([gla(q[i], k[i], v[i], g[i]) for i in range(2)])
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=AUTO)):
        oracle.assert_close([jax.jit(jax.vmap(gla))(q, k, v, g)], [expected], 1e-5, ["o"])
