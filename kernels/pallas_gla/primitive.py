"""The scan as a JAX primitive, which selects a kernel on lowering and has derivatives of every order.

The right kernel is known only when a program is lowered for a platform, possibly another machine's. A
primitive defers the choice until then and traces only the chosen kernel. It also makes a kernel with a custom
backward pass differentiable in forward mode and more than once, which `custom_vjp` does not:

    scan                     out, final_state, states            a kernel's forward
    scan_tangent             d(out, final_state), linear         a kernel's tangent
      ├ its derivative: scans and scan_tangents of them          `pallas_gla.tangent.by_scans`
      └ its transpose: scan_gradient                             a kernel's backward
                         └ its derivatives                       derived from the XLA implementation

`states` is what a kernel saves for its backward pass. It is a function of the operands, so no derivative
needs to flow through it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.interpreters import partial_eval as pe
from jaxtyping import Array, Float

from pallas_gla import chip, chunked_xla, dispatch, sharding, tangent
from pallas_gla.scan import Operands, Scan, saved_shape

# Fields of Operands without derivatives.
_DISCRETE = ("segment_ids",)

scan_p = Primitive("gla_scan")
scan_tangent_p = Primitive("gla_scan_tangent")
scan_gradient_p = Primitive("gla_scan_gradient")
for _primitive in (scan_p, scan_tangent_p, scan_gradient_p):
    _primitive.multiple_results = True


@functools.partial(jax.jit, static_argnames=("scan", "implementation"))
def run(
    operands: Operands, scan: Scan, implementation: str | None
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Return the output and final state of a scan; `implementation` names a kernel or is None for the best.

    Raises:
        NotImplementedError: the named kernel does not run on the platform that the program is lowered for.
    """
    names, arrays = _flatten(operands)
    arrays = sharding.varying_alike(arrays)
    return tuple(scan_p.bind(*arrays, names=names, scan=scan, implementation=implementation, save=False))


def _flatten(operands: Operands) -> tuple[tuple[str, ...], list[jax.Array]]:
    present = {name: x for name, x in operands._asdict().items() if x is not None}
    return tuple(present), list(present.values())


def _operands(names: Sequence[str], arrays: Sequence) -> Operands:
    return Operands(**dict(zip(names, arrays, strict=True)))


def _differentiable(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in _DISCRETE)


# Lowering.


def _forward(*arrays, names, scan, implementation, save, platform, partitioned):
    operands = _operands(names, arrays)
    backend = dispatch.choose(implementation, operands, scan, platform, partitioned)
    out, final_state, states = backend.forward(operands, scan, save=save)
    return [out, final_state, states] if save else [out, final_state]


def _gradient(*arrays, names, scan, implementation, platform, partitioned):
    *arrays, states, d_out, d_final_state = arrays
    operands = _operands(names, arrays)
    backend = dispatch.choose(implementation, operands, scan, platform, partitioned)
    gradients = backend.backward(operands, states, d_out, d_final_state, scan)
    return [getattr(gradients, name) for name in _differentiable(names)]


def _tangent(*arrays, names, moving, scan, implementation, platform, partitioned):
    operands, tangents = _tangent_operands(arrays, names, moving)
    backend = dispatch.choose(implementation, operands, scan, platform, partitioned)
    results = None
    if backend is not chunked_xla:
        results = tangent.by_kernel(backend, operands, tangents, scan)
    return _portable_tangent(operands, tangents, scan) if results is None else list(results)


def _tangent_operands(arrays, names, moving) -> tuple[Operands, Operands]:
    """Return the operands and the tangents of `scan_tangent_p`; the saved states stand between them."""
    count = len(names)
    # Every operand has the same class, so the tangents of q, k, v and g may be None too.
    none: dict[str, Any] = dict.fromkeys(Operands._fields)
    tangents = Operands(**none | dict(zip(moving, arrays[count + 1 :], strict=True)))
    return _operands(names, arrays[:count]), tangents


def _portable(*arrays, names, scan):
    """Run the plain JAX implementation, from which rules without a kernel are derived."""
    return list(chunked_xla.forward(_operands(names, arrays), scan, save=False)[:2])


def _portable_tangent(operands, tangents, scan):
    names, arrays = _flatten(operands)
    moving, dots = _flatten(tangents)
    values = dict(zip(names, arrays, strict=True))

    def function(*moved):
        return _portable(*(values | dict(zip(moving, moved, strict=True))).values(), names=names, scan=scan)

    return jax.jvp(function, tuple(values[name] for name in moving), tuple(dots))[1]


def _portable_gradient(*arrays, names, scan):
    *primals, d_out, d_final_state = arrays
    values = dict(zip(names, primals, strict=True))
    wanted = _differentiable(names)

    def function(*arrays):
        return _portable(*(values | dict(zip(wanted, arrays, strict=True))).values(), names=names, scan=scan)

    return list(jax.vjp(function, *(values[name] for name in wanted))[1]([d_out, d_final_state]))


def _array_names(
    primitive: Primitive, names: Sequence[str], save: bool = False, moving: Sequence[str] = (), **_
) -> tuple[list, list]:
    """Return what the operands and the results of a primitive are, as in `sharding.Partition.spec`."""
    results, wanted = ["out", "final_state"], list(_differentiable(names))
    if primitive is scan_p:
        return [*names], results + ["states"] * save
    if primitive is scan_gradient_p:
        return [*names, "states", "d_out", "d_final_state"], wanted
    return [*names, "states", *moving], results


def _lowering(primitive: Primitive, function: Callable, platform: str, ctx, *args, **params):
    """Lower a primitive: on every shard if the context mesh has free axes, else as the traced `function`."""
    if partition := sharding.Partition.of(ctx.avals_in[0]):
        operands, results = _array_names(primitive, **params)
        bind = functools.partial(primitive.bind, **params)

        def per_shard(*arrays):
            return partition.run(bind, arrays, operands, results, ctx.avals_out)

        return mlir.lower_fun(per_shard, multiple_results=True)(ctx, *args)
    # Types without a mesh: the program is already per shard.
    plain = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        partitioned = any(axes.mesh.shape[name] > 1 for name in set(axes.mesh.axis_names) - axes.manual_axes)
    else:
        partitioned = (axes.num_devices or 1) > 1
    chosen = functools.partial(function, platform=platform, partitioned=partitioned)
    with chip.lowering_for(platform, ctx):
        return mlir.lower_fun(chosen, multiple_results=True)(ctx.replace(avals_in=plain), *args, **params)


def _eager(function: Callable, *args, **params):
    """Run without jit, where only the XLA implementation applies."""
    return function(*args, **params, platform="cpu", partitioned=False)


for _primitive, _function in ((scan_p, _forward), (scan_tangent_p, _tangent), (scan_gradient_p, _gradient)):
    _primitive.def_impl(functools.partial(_eager, _function))
    for _platform in dispatch.PLATFORMS:
        _rule = functools.partial(_lowering, _primitive, _function, _platform)
        mlir.register_lowering(_primitive, _rule, platform=_platform)


# Result types.


def _aval(like, shape, dtype, spec=()):
    """Return an array type that varies over the same mesh axes as `like`."""
    spec = jax.sharding.PartitionSpec(*spec, *[None] * (len(shape) - len(spec)))
    return like.update(
        shape=shape, dtype=jnp.dtype(dtype), weak_type=False, sharding=like.sharding.update(spec=spec)
    )


def _result_avals(operands: Operands, *states: tuple) -> list:
    """Return the types of the output, the final state and, if given by shape and dtype, the saved states."""
    batch, _, heads, width = operands.k.shape
    # Explicit mesh axes shard the results as they shard the batch and the heads of q.
    q: Any = operands.q  # an abstract value
    by_batch, _, by_heads, _ = q.sharding.spec
    v, state = operands.v, (batch, heads, width, operands.v.shape[3])
    return [
        _aval(v, v.shape, v.dtype, (by_batch, None, by_heads)),
        _aval(v, state, jnp.float32, (by_batch, by_heads)),
        *(_aval(v, shape, dtype, (by_batch, None, None, by_heads)) for shape, dtype in states),
    ]


@scan_p.def_abstract_eval
def _(*avals, names, scan, implementation, save):
    operands = _operands(names, avals)
    return _result_avals(operands, *([saved_shape(operands, scan)] if save else []))


@scan_tangent_p.def_abstract_eval
def _(*avals, names, moving, scan, implementation):
    return _result_avals(_operands(names, avals[: len(names)]))


@scan_gradient_p.def_abstract_eval
def _(*avals, names, scan, implementation):
    by_name = dict(zip(names, avals, strict=False))
    return [by_name[name].update(weak_type=False) for name in _differentiable(names)]


# Derivatives.


def _scan_jvp(primals, tangents, *, save, **params):
    *results, states = scan_p.bind(*primals, save=True, **params)
    moving, dots = _nonzero(params["names"], tangents)
    if moving:
        result_tangents = scan_tangent_p.bind(*primals, states, *dots, moving=moving, **params)
    else:
        result_tangents = [_no_tangent(x) for x in results]
    if save:
        results, result_tangents = [*results, states], [*result_tangents, _no_tangent(states)]
    return results, result_tangents


def _no_tangent(x) -> ad.Zero:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _nonzero(names: Sequence[str], tangents: Sequence) -> tuple[tuple[str, ...], list[jax.Array]]:
    """Return the names of the operands that move, and their tangents."""
    pairs = zip(names, tangents, strict=True)
    found = {name: x for name, x in pairs if name not in _DISCRETE and type(x) is not ad.Zero}
    return tuple(found), list(found.values())


def _tangent_jvp(primals, tangents, *, names, moving, scan, implementation):
    """Differentiate the tangent as a function of scans, so that second derivatives run kernels too."""
    params = {"names": names, "scan": scan, "implementation": implementation}
    results = scan_tangent_p.bind(*primals, moving=moving, **params)
    # The states depend on the operands, not the other way round.
    tangents = [*tangents[: len(names)], None, *tangents[len(names) + 1 :]]
    fields = [*names, "states", *moving]
    moved = [
        i
        for i, x in enumerate(tangents)
        if x is not None and type(x) is not ad.Zero and fields[i] not in _DISCRETE
    ]
    if not moved:
        return results, [_no_tangent(x) for x in results]
    # Only Triton's and the TPU's kernels run all scans that a tangent takes.
    kernel = implementation if scan.interpret else None

    def run(operands: Operands, scan: Scan) -> tuple:
        names, arrays = _flatten(operands)
        arrays = sharding.varying_alike(arrays)
        return tuple(scan_p.bind(*arrays, names=names, scan=scan, implementation=kernel, save=False))

    def function(*arrays):
        arrays = dict(enumerate(primals)) | dict(zip(moved, arrays, strict=True))
        operands, dots = _tangent_operands(tuple(arrays.values()), names, moving)
        return list(tangent.by_scans(run, operands, dots, scan))

    return results, jax.jvp(function, tuple(primals[i] for i in moved), tuple(tangents[i] for i in moved))[1]


def _tangent_transpose(cotangents, *arrays, names, moving, **params):
    count = len(names)
    primals, states, tangents = arrays[:count], arrays[count], arrays[count + 1 :]
    cotangents = [ad.instantiate_zeros(x) for x in cotangents]
    gradients = scan_gradient_p.bind(*primals, states, *cotangents, names=names, **params)
    gradients = dict(zip(_differentiable(names), gradients, strict=True))
    wanted = [
        gradients[name] if ad.is_undefined_primal(x) else None
        for name, x in zip(moving, tangents, strict=True)
    ]
    return [None] * (count + 1) + wanted


def _gradient_jvp(primals, tangents, *, names, scan, **params):
    """Differentiate the gradient as the XLA implementation's, a function of all operands but the states."""
    results = scan_gradient_p.bind(*primals, names=names, scan=scan, **params)
    states = len(names)
    arrays = primals[:states] + primals[states + 1 :]
    tangents = [ad.instantiate_zeros(t) for t in tangents[:states] + tangents[states + 1 :]]
    tangents = [
        np.zeros(t.shape, jax.dtypes.float0) if not jnp.issubdtype(x.dtype, jnp.floating) else t
        for x, t in zip(arrays, tangents, strict=True)
    ]
    plain = sharding.without_explicit_axes(
        functools.partial(_portable_gradient, names=names, scan=scan), [jax.typeof(x) for x in results]
    )
    return results, jax.jvp(plain, tuple(arrays), tuple(tangents))[1]


ad.primitive_jvps[scan_p] = _scan_jvp
ad.primitive_jvps[scan_tangent_p] = _tangent_jvp
ad.primitive_jvps[scan_gradient_p] = _gradient_jvp
ad.primitive_transposes[scan_tangent_p] = _tangent_transpose


def _drop_unused_states(used_outputs, *arguments):
    """Drop the saved states if nothing reads them, as in the first forward pass under `jax.checkpoint`."""
    eqn = arguments[-1]  # JAX 0.12 passes another argument before it
    if not any(used_outputs):
        return [False] * len(eqn.invars), None
    if eqn.params["save"] and not used_outputs[2]:
        eqn = eqn.replace(params=eqn.params | {"save": False}, outvars=eqn.outvars[:2])
    return [True] * len(eqn.invars), eqn


pe.dce_rules[scan_p] = _drop_unused_states


# Batching: merge the mapped axis into B, the leading axis of every operand and result.


def _batching(primitive: Primitive):
    def rule(axis, arrays, axes, **params):
        # If the mesh may shard B but not the mapped axis, B has to be the outer one to keep its shards whole.
        inner = bool(sharding.free_axes()) and not (axis.explicit_mesh_axis or axis.spmd_name)

        def merge(x, position):
            x = (
                jnp.broadcast_to(x, (axis.size, *x.shape))
                if position is None
                else jnp.moveaxis(x, position, 0)
            )
            return sharding.merge_axes(jnp.swapaxes(x, 0, 1) if inner else x, axis.explicit_mesh_axis or ())

        def split(x):
            return sharding.split_axis(x, axis.size, inner, axis.explicit_mesh_axis or ())

        results = primitive.bind(*map(merge, arrays, axes), **params)
        return list(map(split, results)), [int(inner)] * len(results)

    return rule


for _primitive in (scan_p, scan_tangent_p, scan_gradient_p):
    batching.fancy_primitive_batchers[_primitive] = _batching(_primitive)
