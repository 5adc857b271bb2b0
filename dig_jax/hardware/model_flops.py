"""Flops that a model needs, however they are computed: the numerator of MFU (Chowdhery et al. 2022, PaLM)."""

import math
from collections.abc import Callable

import jax
from jax.extend import core


def training_flops(forward: Callable, *arguments) -> int:
    """Flops of the forward pass and of a backward pass twice as long; nothing is computed twice.

    Args:
        forward: the network.
        arguments: its arguments, or their shapes.
    """
    return 3 * forward_flops(forward, *arguments)


def forward_flops(forward: Callable, *arguments) -> int:
    """Flops of matrix products, convolutions and recurrences in a function; elementwise ones do not count."""
    return _jaxpr_flops(jax.make_jaxpr(forward)(*arguments).jaxpr)


def _jaxpr_flops(jaxpr: core.Jaxpr) -> int:
    return sum(map(_equation_flops, jaxpr.eqns))


def _equation_flops(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    shapes = [variable.aval.shape for variable in equation.invars]
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        out = math.prod(equation.outvars[0].aval.shape)
        return 2 * out * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        out = math.prod(equation.outvars[0].aval.shape)
        out_features = shapes[1][params["dimension_numbers"].rhs_spec[0]]
        return 2 * out * math.prod(shapes[1]) // out_features
    if name == "gla_scan":
        # A token of a head is added to its state, k v^T, and reads it, q S.
        batch, tokens, heads, keys = shapes[params["names"].index("k")]
        return 4 * batch * tokens * heads * keys * shapes[params["names"].index("v")][-1]
    inner = sum(_jaxpr_flops(jaxpr) for value in params.values() for jaxpr in _jaxprs(value))
    return inner * params["length"] if name == "scan" else inner


def _jaxprs(value: object) -> list[core.Jaxpr]:
    values = value if isinstance(value, (tuple, list)) else [value]
    closed = [getattr(each, "jaxpr", each) for each in values]
    return [each for each in closed if isinstance(each, core.Jaxpr)]
