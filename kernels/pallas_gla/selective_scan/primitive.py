"""The scan and its gradient as JAX primitives, which select a kernel when a program is lowered.

Only then is the platform known, possibly another machine's. Plain JAX runs where there is no kernel, and
where XLA partitions the program over devices: a kernel needs a `shard_map`.
"""

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jaxtyping import Array, Float

from pallas_gla import chip
from pallas_gla.selective_scan import chunked_xla, mosaic_tpu, triton
from pallas_gla.selective_scan.scan import Operands, Options, num_chunks

KERNELS = {"mosaic": ("tpu", mosaic_tpu), "triton": ("cuda", triton)}
PLATFORMS = ("cpu", "tpu", "cuda", "rocm")

scan_p = Primitive("selective_scan")
gradient_p = Primitive("selective_scan_gradient")
for _primitive in (scan_p, gradient_p):
    _primitive.multiple_results = True


def forward(
    operands: Operands, options: Options, *, save: bool
) -> tuple[Float[Array, "b t d"], Float[Array, "b n d"], Float[Array, "b m n d"] | None]:
    """Return the output, the final state and, if `save`, the state that enters each chunk.

    Raises:
        NotImplementedError: the kernel that the options name does not run on the platform.
    """
    names, arrays = _flatten(operands)
    results = scan_p.bind(*arrays, names=names, options=options, save=save)
    return tuple(results) if save else (*results, None)


def backward(
    operands: Operands,
    states: Float[Array, "b m n d"],
    d_y: Float[Array, "b t d"],
    d_final_state: Float[Array, "b n d"],
    options: Options,
) -> Operands:
    """Return the gradients of the operands, from the states that `forward` saved."""
    names, arrays = _flatten(operands)
    gradients = gradient_p.bind(*arrays, states, d_y, d_final_state, names=names, options=options)
    return _operands(names, gradients)


def _flatten(operands: Operands) -> tuple[tuple[str, ...], list[Any]]:
    present = {name: x for name, x in operands._asdict().items() if x is not None}
    return tuple(present), list(present.values())


def _operands(names: Sequence[str], arrays: Sequence[Any]) -> Operands:
    found: dict[str, Any] = {"z": None, **dict(zip(names, arrays, strict=True))}
    return Operands(**found)


@scan_p.def_abstract_eval
def _(*avals, names, options, save):
    operands = _operands(names, avals)
    batch, tokens, channels = operands.x.shape
    state = (operands.a.shape[0], channels)
    x: Any = operands.x  # an abstract value

    def float32(*shape: Any) -> ShapedArray:  # numbers, or symbols of an exported program
        return ShapedArray(shape, jnp.float32)

    saved = [float32(batch, num_chunks(tokens), *state)] if save else []
    return [ShapedArray(x.shape, x.dtype), float32(batch, *state), *saved]


@gradient_p.def_abstract_eval
def _(*avals, names, options):
    return [ShapedArray(aval.shape, aval.dtype) for aval in avals[: len(names)]]


def _run_scan(*arrays, names, options, save, platform, partitioned):
    operands = _operands(names, arrays)
    backend = _choose(operands, options, platform, partitioned)
    results = backend.forward(operands, options)
    return list(results[: 2 + save])


def _run_gradient(*arrays, names, options, platform, partitioned):
    *arrays, states, d_y, d_final_state = arrays
    operands = _operands(names, arrays)
    backend = _choose(operands, options, platform, partitioned)
    gradients = backend.backward(operands, states, d_y, d_final_state, options)
    return _flatten(gradients)[1]


def _choose(operands: Operands, options: Options, platform: str, partitioned: bool) -> ModuleType:
    """Return the module that runs a scan.

    Raises:
        NotImplementedError: the named kernel does not run on the platform.
    """
    if options.implementation is not None:
        target, kernel = KERNELS[options.implementation]
        reason = kernel.unsupported(operands, options)
        if target != platform and not options.interpret:
            reason = f"got {platform}; expected {target}, or interpret=True"
        if reason:
            raise NotImplementedError(f"unsupported implementation={options.implementation!r}: {reason}")
        return kernel
    symbolic = not all(isinstance(size, int) for size in operands.x.shape)
    for target, kernel in KERNELS.values():
        if target != platform or partitioned or symbolic:
            continue
        if kernel.unsupported(operands, options) is None:
            return kernel
    return chunked_xla


def _lowering(function: Callable, platform: str, ctx, *args, **params):
    """Lower a primitive as the function of the platform's implementation."""
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        partitioned = any(axes.mesh.shape[name] > 1 for name in set(axes.mesh.axis_names) - axes.manual_axes)
    else:
        partitioned = (axes.num_devices or 1) > 1
    # Types without a mesh: the program is already per shard.
    plain = [ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    chosen = functools.partial(function, platform=platform, partitioned=partitioned)
    with chip.lowering_for(platform, ctx):
        return mlir.lower_fun(chosen, multiple_results=True)(ctx.replace(avals_in=plain), *args, **params)


for _primitive, _function in ((scan_p, _run_scan), (gradient_p, _run_gradient)):
    for _platform in PLATFORMS:
        mlir.register_lowering(
            _primitive, functools.partial(_lowering, _function, _platform), platform=_platform
        )


# Batching.


def _by_element(
    primitive: Primitive, arrays: Sequence, axes: Sequence, **params
) -> tuple[Sequence, list[int]]:
    """Run a primitive once per element of the mapped axis.

    The gradients of `a` and `d` are sums over the batch, so the mapped axis cannot be a part of it.
    """
    pairs = list(enumerate(zip(arrays, axes, strict=True)))
    mapped = {i: jnp.moveaxis(x, axis, 0) for i, (x, axis) in pairs if axis is not None}
    results = jax.lax.map(
        lambda element: primitive.bind(*(element.get(i, x) for i, (x, _) in pairs), **params), mapped
    )
    return results, [0] * len(results)


def _in_batch(arrays: Sequence, axes: Sequence, **params) -> tuple[Sequence, list[int]]:
    """Run the scan once, with the mapped axis as a part of the batch, unless `a` or `d` is mapped."""
    names = params["names"]
    shared = [name in ("a", "d") for name in names]
    if any(axis is not None for axis, fixed in zip(axes, shared, strict=True) if fixed):
        return _by_element(scan_p, arrays, axes, **params)
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)

    def merge(x, axis):
        x = jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        return x.reshape(-1, *x.shape[2:])

    merged = (x if fixed else merge(x, axis) for x, axis, fixed in zip(arrays, axes, shared, strict=True))
    results = scan_p.bind(*merged, **params)
    return [x.reshape(size, -1, *x.shape[1:]) for x in results], [0] * len(results)


batching.primitive_batchers[scan_p] = _in_batch
batching.primitive_batchers[gradient_p] = functools.partial(_by_element, gradient_p)
