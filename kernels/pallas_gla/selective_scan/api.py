"""The public function."""

import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_gla.selective_scan import chunked_xla, primitive
from pallas_gla.selective_scan.scan import Operands, Options
from pallas_gla.validation import FLOATS, check_array, one_of

_IMPLEMENTATIONS = (None, "xla", *primitive.KERNELS)


@no_type_check
def selective_scan(
    x: Float[Array, "b t d"],
    dt: Float[Array, "b t d"],
    A: Float[Array, "d n"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    D: Float[Array, " d"],
    z: Float[Array, "b t d"] | None = None,
    *,
    initial_state: Float[Array, "b d n"] | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> Float[Array, "b t d"] | tuple[Float[Array, "b t d"], Float[Array, "b d n"]]:
    """The recurrence of Mamba with an output gate (Gu & Dao 2023, equation 2 and algorithm 2).

    Computes, per channel and in float32::

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t
        y_t = (C_t · h_t + D x_t) SiLU(z_t)

    The states of a sequence are never all in memory: a forward pass keeps one per 64 tokens at most, from
    which the backward pass computes the others again. Under ``jax.vmap``, kernels run once per element for
    gradients and if ``A`` or ``D`` is mapped, and otherwise once.

    Args:
        x: input, [B, T, channels].
        dt: step sizes, >= 0, in the shape of ``x``: the result of a softplus.
        A: decay rates, < 0, [channels, N].
        B, C: input and output maps of each token, [B, T, N].
        D: weight of the path around the recurrence, [channels].
        z: logits of the output gate, in the shape of ``x``. Default: no gate.
        initial_state: the state before the first token visited, [B, channels, N]. Default: zero.
        return_final_state: whether to return the state after the last token visited too.
        reverse: whether to visit the tokens from last to first. This equals flipping ``x``, ``dt``, ``B``,
            ``C`` and ``z`` along T and flipping the output back, but moves nothing.
        implementation: ``"mosaic"`` (a kernel for TPUs), ``"triton"`` (a kernel for NVIDIA GPUs) or ``"xla"``
            (plain JAX, in chunks). Default: the kernel of the chip that the program is compiled for, or plain
            JAX. Only ``"xla"`` has derivatives in forward mode.
        interpret: whether to run a kernel in interpret mode, on every platform.

    Returns:
        The output, in the shape and dtype of ``x``. If ``return_final_state`` is true, a pair of the output
        and the final state, [B, channels, N] in float32.

    Raises:
        ValueError: if an argument has an invalid shape, dtype or value.
        NotImplementedError: if the requested kernel does not support the call or the platform.
    """
    _check(x, dt, A, B, C, D, z, initial_state)
    if implementation not in _IMPLEMENTATIONS:
        expected = one_of(tuple(map(repr, _IMPLEMENTATIONS)))
        raise ValueError(f"invalid implementation: got {implementation!r}; expected {expected}")
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], *A.shape), jnp.float32)
    x, dt, B, C, z = (None if array is None else jnp.asarray(array) for array in (x, dt, B, C, z))
    a, d, state = (jnp.asarray(array, jnp.float32) for array in (A, D, initial_state))
    operands = Operands(x, dt, a.T, B, C, d, z, state.swapaxes(1, 2))
    options = Options(reverse, None if implementation == "xla" else implementation, interpret)
    if implementation == "xla":
        y, final_state, _ = chunked_xla.forward(operands, options, checkpoint=True)
    else:
        y, final_state = selective_scan_call(options, operands)
    return (y, final_state.swapaxes(1, 2)) if return_final_state else y


# The name appears in the compiled program, so that tools can count its operations.
@functools.partial(jax.jit, static_argnums=0)
def selective_scan_call(options: Options, operands: Operands) -> tuple[Array, Array]:
    """Return the output and the final state."""
    return _scan(options, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options: Options, operands: Operands) -> tuple[Array, Array]:
    return primitive.forward(operands, options, save=False)[:2]


def _scan_forward(options: Options, operands: Operands) -> tuple[tuple[Array, Array], Any]:
    y, final_state, states = primitive.forward(operands, options, save=True)
    return (y, final_state), (operands, states)


def _scan_backward(options: Options, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Operands]:
    operands, states = saved
    return (primitive.backward(operands, states, *cotangents, options),)


_scan.defvjp(_scan_forward, _scan_backward)


def _check(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, z: Any, state: Any) -> None:
    """Raise ValueError unless shapes and dtypes of the arrays fit together."""
    for name, array, layout, rank in (("x", x, "[B, T, channels]", 3), ("A", A, "[channels, N]", 2)):
        shape = getattr(array, "shape", ())
        if len(shape) != rank or 0 in shape:
            raise ValueError(f"invalid {name}: got shape {shape}; expected a nonempty array {layout}")
    batch, tokens, channels = x.shape
    own, wide = (str(x.dtype), "float32"), "[B, T, channels]"
    check_array("x", x, wide, x.shape, FLOATS)
    check_array("dt", dt, wide, x.shape, own)
    check_array("A", A, "[channels, N]", (channels, A.shape[1]), own)
    for name, array in (("B", B), ("C", C)):
        check_array(name, array, "[B, T, N]", (batch, tokens, A.shape[1]), own)
    check_array("D", D, "[channels]", (channels,), own)
    if z is not None:
        check_array("z", z, wide, x.shape, own)
    if state is not None:
        check_array("initial_state", state, "[B, channels, N]", (batch, *A.shape), own)
