"""The only interface to Pallas's Triton backend.

JAX 0.11 deprecates this backend and warns on lowering; this module silences the warning, because callers
cannot act on it. In a JAX without the backend `available` is False and XLA runs instead of the kernels. They
could then run through `jax_triton.triton_call`, with their bodies rewritten as Triton functions; the bodies
get refs and `program_id` from this module only.
"""

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jaxtyping import Array, BFloat16, Bool, Float, Int, Shaped

triton: Any = None
with contextlib.suppress(ImportError):
    triton = importlib.import_module("jax.experimental.pallas.triton")

available = triton is not None
# Pallas does not pass `maxnreg` to Triton, which reads it from the module that Pallas's lowering rules build.
lowering: Any = None
with contextlib.suppress(ImportError):
    lowering = importlib.import_module("jax._src.pallas.triton.lowering")
program_id = pl.program_id


def load(
    ref: Any, index: tuple[Int[Array, "..."], ...], mask: Bool[Array, "..."] | None
) -> Shaped[Array, "..."]:
    """Load the elements of a ref at index arrays; zero where the mask is False."""
    return triton.load(ref.at[index], mask=mask, other=None if mask is None else jnp.zeros((), ref.dtype))


def store(
    ref: Any, index: tuple[Int[Array, "..."], ...], x: Shaped[Array, "..."], mask: Bool[Array, "..."] | None
) -> None:
    """Store x into a ref at index arrays, in the dtype of the ref, where the mask is True."""
    triton.store(ref.at[index], x.astype(ref.dtype), mask=mask)


def approximate(instruction: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply PTX's approximate "rcp", "lg2" or "ex2" to a float32; numbers below 2**-126 count as zero."""
    return _inline(f"{instruction}.approx.ftz.f32 $0, $1;", "=f,f", x)


def times_exp2(x: Float[Array, "..."], exponent: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return x * 2**exponent in float32; powers below 2**-126 are zero.

    One inline function, so that a power used twice is computed twice instead of occupying a register.
    """
    code = "{ .reg .f32 power; ex2.approx.ftz.f32 power, $2; mul.f32 $0, $1, power; }"
    return _inline(code, "=f,f,f", x, jnp.broadcast_to(exponent, x.shape))


def widen(x: BFloat16[Array, "..."]) -> Float[Array, "..."]:
    """Convert to float32 at the point of use; a cast would be scheduled early and occupy registers."""
    code = "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }"
    return _inline(code, "=r,=r,r", x, pack=2)


def _inline(code: str, constraints: str, *arrays: Float[Array, "..."], pack: int = 1) -> Float[Array, "..."]:
    result = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)
    [y] = triton.elementwise_inline_asm(
        code, args=arrays, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )
    return y


def limit_registers(x: Int[Array, ""], count: int | None) -> Int[Array, ""]:
    """Return x, in a kernel whose threads take at most this many registers.

    Without a limit the compiler takes what it can use, and fewer programs share a core. It is a hint, without
    effect in a JAX whose Pallas lacks the private function that it needs.
    """
    return x if count is None else limit_registers_p.bind(x, count=count)


limit_registers_p = Primitive("gla_limit_registers")
limit_registers_p.def_abstract_eval(lambda x, *, count: x)
mlir.register_lowering(limit_registers_p, lambda ctx, x, *, count: [x])


def _limit_registers(ctx: Any, x: Any, *, count: int) -> Any:
    here: Any = ir.InsertionPoint.current
    module = here.block.owner
    while module.name != "builtin.module":
        module = module.parent
    module.attributes["ttg.maxnreg"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), count)
    return x


if hasattr(lowering, "register_lowering"):
    lowering.register_lowering(limit_registers_p)(_limit_registers)


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
    """Launch `kernel(*array_refs, *result_refs)` and return the results.

    Args:
        kernel: the kernel's body; its `__name__` names the compiled kernel.
        arrays: the operands.
        results: shape and dtype of each result.
        programs: number of programs, distinguished by `program_id(0)`.
        warps, stages: Triton's `num_warps` and `num_stages`.
        cost: estimated cost of all programs together.
        interpret: whether to run in interpret mode, on any platform.
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
    return [ShapedArray(shape, dtype) for shape, dtype in results]


def _lowering(ctx, *args, run, results):
    # The program is already per shard, so types have no mesh.
    local = jax.sharding.ManualAxisType(varying=frozenset())
    shapes = [jax.ShapeDtypeStruct(*result, manual_axis_type=local) for result in results]

    def function(*arrays):
        return run(out_shape=shapes)(*arrays)

    with warnings.catch_warnings(), _any_gpu():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)


mlir.register_lowering(triton_call_p, _lowering)


def _any_gpu() -> contextlib.AbstractContextManager:
    """Name a GPU, as JAX 0.11 and later require; its kind affects only casts to float8."""
    abstract_device = getattr(jax.sharding, "AbstractDevice", None)
    if abstract_device is None:
        return contextlib.nullcontext()
    device = abstract_device(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))
