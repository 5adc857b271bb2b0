"""FLOPs of a model's definition, independent of its compiled program: the numerator of MFU.

See Chowdhery et al. 2022 (PaLM). Rematerialized operations do not count.
"""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def training_flops(forward: Callable, *arguments) -> int:
    """Return the FLOPs of the forward pass and of the backward pass, which counts twice the forward pass.

    Args:
        forward: the network.
        arguments: its arguments, or their `ShapeDtypeStruct`s.
    """
    return 3 * forward_flops(forward, *arguments)


def forward_flops(forward: Callable, *arguments) -> int:
    """Return the FLOPs of matrix products, convolutions and scans, without elementwise operations."""
    return _jaxpr_flops(jax.make_jaxpr(forward)(*arguments).jaxpr)


def _jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    shapes = [_shape(variable) for variable in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        out = math.prod(_shape(equation.outvars[0]))
        return 2 * out * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        out = math.prod(_shape(equation.outvars[0]))
        out_features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
        return 2 * out * math.prod(shapes[1]) // out_features
    if name == "gla_scan":
        # Each token of a head updates the state with k vᵀ and reads q S.
        batch, tokens, heads, keys = shapes[params["names"].index("k")]
        return 4 * batch * tokens * heads * keys * shapes[params["names"].index("v")][-1]
    if params.get("name") == "selective_scan_call":
        # Each token of a channel adds to every state and reads it.
        (batch, tokens, channels), (states, _) = shapes[0], shapes[2]
        return 4 * batch * tokens * channels * states
    inner = sum(_jaxpr_flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value))
    return inner * params["length"] if name == "scan" else inner


def _shape(variable: core.Var | core.Literal) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())


def _jaxprs(value: object) -> list[core.Jaxpr]:
    values = value if isinstance(value, (tuple, list)) else [value]
    closed = [getattr(each, "jaxpr", each) for each in values]
    return [each for each in closed if isinstance(each, core.Jaxpr)]
