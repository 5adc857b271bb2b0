"""The one place that knows how a kernel reaches Triton.

Pallas lowers to Triton by itself; JAX 0.11 deprecates that, with a warning on lowering that is of no use to
a caller and is silenced here. When a JAX comes without it, `available` says so, the backend refuses and XLA
runs instead. The way to get kernels back then is `jax_triton.triton_call`, with the bodies as Triton
functions: what the bodies use of Pallas, refs and `program_id`, they get from this module.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, BFloat16, Bool, Float, Int, Shaped

try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

available = triton is not None
program_id = pl.program_id


def load(
    ref: Any, index: tuple[Int[Array, "..."], ...], mask: Bool[Array, "..."] | None
) -> Shaped[Array, "..."]:
    """Elements of a ref at index arrays; zero where the mask is False."""
    return triton.load(ref.at[index], mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store(
    ref: Any, index: tuple[Int[Array, "..."], ...], x: Shaped[Array, "..."], mask: Bool[Array, "..."] | None
) -> None:
    """Writes elements of a ref in its dtype, where the mask is True."""
    triton.store(ref.at[index], x.astype(ref.dtype), mask=mask)


def approximate(instruction: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """PTX's approximate "rcp", "lg2" or "ex2" of a float32; numbers below 2**-126 are zero."""
    return _inline(f"{instruction}.approx.ftz.f32 $0, $1;", "=f,f", x)


def times_exp2(x: Float[Array, "..."], exponent: Float[Array, "..."]) -> Float[Array, "..."]:
    """x * 2**exponent in float32; powers below 2**-126 are zero.

    In one piece, so that a power that is wanted twice is computed twice and does not wait in a register.
    """
    code = "{ .reg .f32 power; ex2.approx.ftz.f32 power, $2; mul.f32 $0, $1, power; }"
    return _inline(code, "=f,f,f", x, jnp.broadcast_to(exponent, x.shape))


def widen(x: BFloat16[Array, "..."]) -> Float[Array, "..."]:
    """To float32 where it stands: a cast would take place as soon as x is known, and take its registers."""
    code = "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }"
    return _inline(code, "=r,=r,r", x, pack=2)


def _inline(code: str, constraints: str, *arrays: Float[Array, "..."], pack: int = 1) -> Float[Array, "..."]:
    result = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)
    [y] = triton.elementwise_inline_asm(
        code, args=arrays, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )
    return y


def device_kind() -> str | None:
    """The GPU that programs are made for, None where there is none."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return device.device_kind
    try:
        return jax.local_devices(backend="gpu")[0].device_kind
    except RuntimeError:
        return None


triton_call_p = Primitive("gla_triton_call")
triton_call_p.multiple_results = True


def call(
    kernel: Callable[..., None],
    arrays: Sequence[Shaped[Array, "..."]],
    results: Sequence[tuple[tuple[int, ...], Any]],
    *,
    programs: int,
    warps: int,
    stages: int,
    cost: pl.CostEstimate,
    interpret: bool,
) -> list[Shaped[Array, "..."]]:
    """Runs `kernel(*refs of arrays, *refs of results)` in as many programs.

    Args:
        kernel: whose `__name__` the compiled kernel bears.
        arrays: the operands.
        results: shape and dtype of each result.
        programs: how often the kernel runs, numbered by `program_id(0)`.
        warps, stages: as Triton counts them.
        cost: of all programs together.
        interpret: runs the kernel on any platform, with JAX.
    """
    run = functools.partial(
        pl.pallas_call,
        kernel,
        grid=(programs,),
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
        cost_estimate=cost,
        interpret=interpret,
        name=kernel.__name__,
    )
    results = tuple((tuple(shape), jnp.dtype(dtype)) for shape, dtype in results)
    return triton_call_p.bind(*arrays, run=run, results=results)


@triton_call_p.def_abstract_eval
def _(*avals, run, results):
    del avals, run
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in results]


def _lowering(ctx, *args, run, results):
    # Types say nothing of meshes: the program is per shard by now.
    whole = jax.sharding.ManualAxisType(varying=frozenset())
    shapes = [jax.ShapeDtypeStruct(*result, manual_axis_type=whole) for result in results]

    def function(*arrays):
        return run(out_shape=shapes)(*arrays)

    with warnings.catch_warnings(), _device_to_lower_for():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)


mlir.register_lowering(triton_call_p, _lowering)


@contextlib.contextmanager
def _device_to_lower_for() -> Iterator[None]:
    """Names a GPU to JAX 0.11 and later, which ask for one where there is none (ahead of time)."""
    abstract_device = getattr(jax.sharding, "AbstractDevice", None)
    if abstract_device is None or device_kind() is not None:
        yield
        return
    device = abstract_device(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        yield
