"""NaN and infinities in matrix products, kept from tokens that do not depend on them.

A product multiplies all tokens of a chunk, and zero times NaN is NaN. So `without` removes NaN and infinities
from the operands, and `without_gradient` from the gradients of the results. `trace` carries them past the
products: it is zero for finite numbers and NaN otherwise, and so is its gradient.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

# Each is linear for finite numbers, and the other's transpose.
without_p, without_gradient_p = Primitive("gla_without_nan"), Primitive("gla_without_nan_gradient")


def without(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Replace NaN and infinities by zeros. The gradient passes unchanged."""
    return without_p.bind(x)


def without_gradient(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return x. In its gradient, NaN and infinities are replaced by zeros."""
    return without_gradient_p.bind(x)


def trace(x: Float[Array, "*shape n"]) -> Float[Array, "*shape"]:
    """Return 0 for rows of finite numbers, and NaN for others."""
    return jnp.sum(0 * x.astype(jnp.float32), axis=-1)


def _regular(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


for _primitive, _transpose, _function in (
    (without_p, without_gradient_p, _regular),
    (without_gradient_p, without_p, lambda x: x),
):
    _primitive.def_impl(jax.jit(_function))
    _primitive.def_abstract_eval(lambda aval: aval)
    mlir.register_lowering(_primitive, mlir.lower_fun(_function, multiple_results=False))
    batching.defvectorized(_primitive)
    ad.deflinear2(_primitive, lambda gradient, _, transpose=_transpose: [transpose.bind(gradient)])
