import functools
import logging
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


@pytest.mark.parametrize(
    ("axes", "types"),
    [
        (("data", "tensor"), AUTO),
        (("fsdp", "model"), EXPLICIT),
        pytest.param(("data", "tensor"), EXPLICIT, marks=pytest.mark.slow),
        pytest.param(("fsdp", "model"), AUTO, marks=pytest.mark.slow),
    ],
)
def test_sharding_batch_and_heads_equals_one_device_and_gathers_nothing(axes, types):
    mesh = jax.make_mesh((2, 2), axes, axis_types=types)
    arrays, gradient = arrays_and_gradient()
    expected = jax.jit(gradient)(*arrays)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, P(axes[0], None, axes[1]))) for x in arrays[:5]]
        compiled = jax.jit(gradient).lower(*split, arrays[5]).compile()
        oracle.assert_close(compiled(*split, arrays[5]), expected, 1e-5, NAMES)
    # Only the weight's gradient, a sum over the devices, is communicated.
    collective = (
        r" = (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    )
    moved = " ".join(re.findall(collective, compiled.as_text()))
    assert set() != set(re.findall(r"\w+\[[\d,]*\]", moved)) <= {"f32[16]", "f32[2,16]", "f32[4,16]"}


def test_sizes_that_a_mesh_does_not_divide_run_unsharded():
    arrays, _ = oracle.inputs(1, b=3, h=3)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=AUTO)
    expected = gla(*arrays[:4])
    with jax.set_mesh(mesh):
        oracle.assert_close([jax.jit(gla)(*arrays[:4])], [expected], 1e-6, ["o"])


def test_auto_axes_inside_a_shard_map_still_shard_the_batch():
    (q, k, v, g, _), (d_out, _) = oracle.inputs(2, b=4, t=32)
    mesh = jax.make_mesh((2, 2), ("data", "context"), axis_types=AUTO)

    def results(scan, q, k, v, g):
        o, vjp = jax.vjp(scan, q, k, v, g)
        return (o, *vjp(d_out))

    expected = results(gla, q, k, v, g)
    with jax.set_mesh(mesh):
        scan = functools.partial(gla, axis_name="context")
        tokens = P(None, "context")
        split = jax.shard_map(scan, in_specs=(tokens,) * 4, out_specs=tokens, axis_names={"context"})
        actual = jax.jit(functools.partial(results, split))(q, k, v, g)
        oracle.assert_close(actual, expected, 1e-5, ["o", *NAMES[:4]])


@pytest.mark.parametrize(
    ("types", "manual"),
    [
        (AUTO, "data"),
        (EXPLICIT, "tensor"),
        pytest.param(AUTO, "tensor", marks=pytest.mark.slow),
        pytest.param(EXPLICIT, "data", marks=pytest.mark.slow),
    ],
)
def test_gradients_inside_a_partly_manual_shard_map_equal_those_of_one_device(types, manual):
    arrays, gradient = arrays_and_gradient()
    expected = jax.jit(gradient)(*arrays)
    local = P("data") if manual == "data" else P(None, None, "tensor")
    specs = (local,) * 5 + (P(),)

    def loss(*arrays):
        return jnp.sum(jnp.sin(scan(*arrays)))

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=types)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]
        scan = functools.partial(gated_gla_2d, **GRID)
        scan = jax.shard_map(scan, in_specs=specs, out_specs=local, axis_names={manual})
        actual = jax.jit(jax.grad(jax.checkpoint(loss), argnums=range(6)))(*split)
    oracle.assert_close(actual, expected, 1e-5, NAMES)


@pytest.mark.parametrize(
    ("types", "place", "spmd_axis_name"),
    [
        (AUTO, P(), None),
        (AUTO, P("data"), "data"),
        (EXPLICIT, P("data", None, None, "tensor"), None),
        pytest.param(EXPLICIT, P("tensor", "data"), None, marks=pytest.mark.slow),
        pytest.param(EXPLICIT, P(None, "data", None, "tensor"), None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_per_example_under_a_mesh_equal_those_without_one(types, place, spmd_axis_name):
    arrays, gradient = arrays_and_gradient()
    *mapped, weight = arrays
    mapped = [jnp.stack([x, x + 1 if x is mapped[0] else x]) for x in mapped]
    axes = (0,) * 5 + (None,)
    expected = jax.jit(jax.vmap(gradient, axes))(*mapped, weight)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=types)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, place)) for x in mapped]
        actual = jax.jit(jax.vmap(gradient, axes, spmd_axis_name=spmd_axis_name))(*split, weight)
        oracle.assert_close(actual, expected, 1e-5, NAMES)


@pytest.mark.parametrize("place", [P("data", None, "tensor"), P("tensor", "data")], ids=str)
def test_second_derivatives_of_explicitly_sharded_arrays_equal_those_of_one_device(place):
    arrays, gradient = arrays_and_gradient()

    def product(*arrays):
        return jax.jvp(lambda q, k: gradient(q, k, *arrays[2:]), arrays[:2], arrays[2:4])[1]

    expected = jax.jit(product)(*arrays)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=EXPLICIT)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, place)) for x in arrays[:5]]
        oracle.assert_close(jax.jit(product)(*split, arrays[5]), expected, 1e-4, NAMES)


@pytest.mark.parametrize("types", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_mapping_over_a_sharded_batch_gathers_nothing(types):
    arrays, _ = oracle.inputs(3, b=4)
    mesh = jax.make_mesh((4,), ("data",), axis_types=types[:1])
    with jax.set_mesh(mesh):
        split = [jax.device_put(jnp.stack([x, x]), NamedSharding(mesh, P(None, "data"))) for x in arrays[:4]]
        text = jax.jit(jax.vmap(gla)).lower(*split).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text)


@pytest.mark.parametrize("types", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_the_second_call_outside_jit_compiles_nothing(types, caplog):
    (q, k, v, g, _), _ = oracle.inputs(3, b=4, t=16)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=types)):
        expected = gla(q, k, v, g)
        with jax.log_compiles(), caplog.at_level(logging.DEBUG):
            again = gla(q, k, v, g)
    assert not [message for message in caplog.messages if "compil" in message.lower()]
    oracle.assert_close([again], [expected], 0, ["o"])


@pytest.mark.parametrize("types", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_forward_mode_and_its_gradient_are_sharded(types):
    arrays, _ = oracle.inputs(5, b=4, h=2, t=16)
    dots, _ = oracle.inputs(6, b=4, h=2, t=16)

    def forward(arrays, dots):
        return jax.jvp(lambda q, v, g: gla(q, arrays[1], v, g), (arrays[0], *arrays[2:]), dots)

    def gradient(arrays, dots):
        return jax.grad(lambda *x: sum(jnp.sum(jnp.sin(y)) for y in forward(*x)), (0, 1))(arrays, dots)

    def both(arrays, dots):
        return jax.tree.leaves((forward(arrays, dots), gradient(arrays, dots)))

    arrays, dots = arrays[:4], (dots[0], *dots[2:4])
    expected = jax.jit(both)(arrays, dots)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=types)
    with jax.set_mesh(mesh):
        placed = jax.device_put((arrays, dots), NamedSharding(mesh, P("data", None, "tensor")))
        actual = jax.jit(both)(*placed)
    oracle.assert_close(actual, expected, 1e-5, ["o", "o_dot", *"qkvg", "q_dot", "v_dot", "g_dot"])
