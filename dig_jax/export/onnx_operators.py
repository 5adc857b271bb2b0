"""Translations of JAX's primitives to ONNX's operators.

A translation is a function (graph, equation, names of the operands, shapes of the operands) -> name of the
result, or names of the results. `jaxpr_to_onnx` has the graph.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import onnx
from onnx import TensorProto, helper

# Primitives that are one node with the same operands.
_SAME = {
    "abs": "Abs",
    "add": "Add",
    "and": "And",
    "ceil": "Ceil",
    "copy": "Identity",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "stop_gradient": "Identity",
    "sub": "Sub",
    "tanh": "Tanh",
}
_REDUCTIONS = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}
_BEFORE_FIRST = np.iinfo(np.int64).min  # the end of a slice with a negative step, before index 0


class UnsupportedError(ValueError):
    """A primitive, or a use of it, without a translation. The message names it."""


def multiple(size: Any) -> int | None:
    """Return k for the size k·b, or None for a number."""
    if isinstance(size, int | np.integer):
        return None
    found = re.fullmatch(r"(?:(\d+)\*)?b", str(size))
    if found is None:
        raise UnsupportedError(f"got an array with {size} elements along an axis; expected a multiple of b")
    return int(found[1] or 1)


def value_info(name: str, spec: Any) -> onnx.ValueInfoProto:
    """Return the description of an input or output with the shape and dtype of `spec`."""
    sizes = [size if isinstance(size, int) else str(size) for size in spec.shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)), sizes)


def _broadcast_in_dim(graph, equation, names, shapes):
    target, kept = equation.params["shape"], equation.params["broadcast_dimensions"]
    added = [axis for axis in range(len(target)) if axis not in kept]
    name, shape = names[0], [1] * len(target)
    for axis, size in zip(kept, shapes[0], strict=True):
        shape[axis] = size
    # Expand adds leading axes.
    if added and (tuple(shape) == tuple(target) or added != list(range(len(added)))):
        name = graph.node("Unsqueeze", [name, graph.ints(*added)])
    return name if tuple(shape) == tuple(target) else graph.node("Expand", [name, graph.shape(target)])


def _reshape(graph, equation, names, shapes):
    sizes = equation.params["new_sizes"]
    symbolic = [multiple(size) is not None for size in sizes]
    if sum(symbolic) == 1:  # ONNX computes the size -1
        sizes = [-1 if symbol else size for size, symbol in zip(sizes, symbolic, strict=True)]
    return graph.node("Reshape", [names[0], graph.shape(sizes)])


def _squeeze(graph, equation, names, shapes):
    return graph.node("Squeeze", [names[0], graph.ints(*equation.params["dimensions"])])


def _expand_dims(graph, equation, names, shapes):
    return graph.node("Unsqueeze", [names[0], graph.ints(*equation.params["dimensions"])])


def _transpose(graph, equation, names, shapes):
    return graph.node("Transpose", names, perm=equation.params["permutation"])


def _concatenate(graph, equation, names, shapes):
    return graph.node("Concat", names, axis=equation.params["dimension"])


def _split(graph, equation, names, shapes):
    sizes, outputs = equation.params["sizes"], [graph.new_name() for _ in equation.outvars]
    graph.node("Split", [names[0], graph.ints(*sizes)], outputs, axis=equation.params["axis"])
    return outputs


def _unstack(graph, equation, names, shapes):
    axis, outputs = equation.params["axis"], [graph.new_name() for _ in equation.outvars]
    graph.node("Split", names, outputs, axis=axis, num_outputs=len(outputs))
    return [graph.node("Squeeze", [output, graph.ints(axis)]) for output in outputs]


def _slice(graph, equation, names, shapes):
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    parts = [
        (start, limit, axis, stride)
        for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True))
        if (start, limit, stride) != (0, shapes[0][axis], 1)
    ]
    columns = [graph.ints(*column) for column in zip(*parts, strict=True)]
    return graph.node("Slice", [names[0], *columns]) if columns else names[0]


def _rev(graph, equation, names, shapes):
    axes = equation.params["dimensions"]
    rows = [[-1] * len(axes), [_BEFORE_FIRST] * len(axes), axes, [-1] * len(axes)]
    return graph.node("Slice", [names[0], *(graph.ints(*row) for row in rows)])


def _pad(graph, equation, names, shapes):
    low, high, interior = zip(*equation.params["padding_config"], strict=True)
    if any(interior) or min(*low, *high) < 0:
        raise UnsupportedError("got a pad with interior or negative padding")
    return graph.node("Pad", [names[0], graph.ints(*low, *high), names[1]])


def _dot_general(graph, equation, names, shapes):
    contracted, batched = equation.params["dimension_numbers"]
    ranks = [len(shape) for shape in shapes]
    if batched == ((), ()) and contracted == ((ranks[0] - 1,), (0,)) and ranks[1] == 2:
        return graph.node("MatMul", names)
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    terms = [[next(letters) for _ in shape] for shape in shapes]
    for left, right in zip(contracted[0] + batched[0], contracted[1] + batched[1], strict=True):
        terms[1][right] = terms[0][left]
    free = [
        letter
        for term, taken in zip(terms, zip(contracted, batched, strict=True), strict=True)
        for axis, letter in enumerate(term)
        if axis not in sum(taken, ())
    ]
    result = [terms[0][axis] for axis in batched[0]] + free
    left, right, out = map("".join, (*terms, result))
    return graph.node("Einsum", names, equation=f"{left},{right}->{out}")


def _gather(graph, equation, names, shapes):
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    axes, collapsed = numbers.start_index_map, numbers.collapsed_slice_dims
    whole = all(sizes[axis] == size for axis, size in enumerate(shapes[0]) if axis not in axes)
    batch = len(shapes[1]) - 1
    if whole and collapsed == axes and len(axes) == 1:  # rows along one axis
        offsets = [
            axis for axis in range(len(equation.outvars[0].aval.shape)) if not 0 <= axis - axes[0] < batch
        ]
        if tuple(offsets) == numbers.offset_dims:
            index = graph.node("Squeeze", [names[1], graph.ints(-1)])
            return graph.node("Gather", [names[0], index], axis=axes[0])
    if whole and not collapsed and not batch:  # one window
        index = graph.node("Cast", [names[1]], to=TensorProto.INT64)
        return _window(graph, names[0], index, axes, [sizes[axis] for axis in axes])
    raise UnsupportedError("got a gather of neither rows along one axis nor one window")


def _window(graph, name, starts, axes, sizes):
    ends = graph.node("Add", [starts, graph.ints(*sizes)])
    return graph.node("Slice", [name, starts, ends, graph.ints(*axes)])


def _dynamic_slice(graph, equation, names, shapes):
    sizes = equation.params["slice_sizes"]
    axes = [axis for axis, size in enumerate(shapes[0]) if sizes[axis] != size]
    if not axes:
        return graph.node("Identity", names[:1])
    one = graph.ints(1)
    starts = [
        graph.node("Reshape", [graph.node("Cast", [names[1 + axis]], to=TensorProto.INT64), one])
        for axis in axes
    ]
    start = graph.node("Concat", starts, axis=0)
    most = graph.ints(*(shapes[0][axis] - sizes[axis] for axis in axes))
    start = graph.node("Max", [graph.node("Min", [start, most]), graph.ints(0)])  # as XLA clamps it
    return _window(graph, names[0], start, axes, [sizes[axis] for axis in axes])


def _select_n(graph, equation, names, shapes):
    which, *cases = names
    if len(cases) != 2:
        raise UnsupportedError(f"got a selection of {len(cases)} cases; expected 2")
    return graph.node("Where", [_as_bool(graph, which), cases[1], cases[0]])


def _as_bool(graph, name):
    return graph.node("Cast", [name], to=TensorProto.BOOL)


def _cast(graph, equation, names, shapes):
    return graph.node("Cast", names, to=helper.np_dtype_to_tensor_dtype(equation.params["new_dtype"]))


def _iota(graph, equation, names, shapes):
    shape, axis = equation.params["shape"], equation.params["dimension"]
    index = np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return graph.constant(np.broadcast_to(index, shape), equation.params["dtype"])


def _integer_pow(graph, equation, names, shapes):
    dtype = equation.invars[0].aval.dtype
    return graph.node("Pow", [names[0], graph.constant(equation.params["y"], dtype)])


def _square(graph, equation, names, shapes):
    return graph.node("Mul", [names[0], names[0]])


def _rsqrt(graph, equation, names, shapes):
    return graph.node("Reciprocal", [graph.node("Sqrt", names)])


def _log1p(graph, equation, names, shapes):
    one = graph.constant(1, equation.invars[0].aval.dtype)
    return graph.node("Log", [graph.node("Add", [names[0], one])])


def _ne(graph, equation, names, shapes):
    return graph.node("Not", [graph.node("Equal", names)])


def _stack(graph, equation, names, shapes):
    axis = equation.params["axis"]
    return graph.node("Concat", [graph.node("Unsqueeze", [x, graph.ints(axis)]) for x in names], axis=axis)


def _dim_as_value(graph, equation, names, shapes):
    size = graph.node("Squeeze", [graph.shape([equation.params["dim"]])])
    return graph.node("Cast", [size], to=helper.np_dtype_to_tensor_dtype(equation.outvars[0].aval.dtype))


def _rem(graph, equation, names, shapes):
    return graph.node("Mod", names, fmod=1)


def _round(graph, equation, names, shapes):
    if equation.params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise UnsupportedError("got a rounding of halves away from zero; expected to even")
    return graph.node("Round", names)


def _expm1(graph, equation, names, shapes):
    return graph.node("Sub", [graph.node("Exp", names), graph.constant(1, equation.invars[0].aval.dtype)])


def _clamp(graph, equation, names, shapes):
    low, x, high = names
    return graph.node("Min", [graph.node("Max", [x, low]), high])


def _cumsum(graph, equation, names, shapes):
    axis = graph.constant(equation.params["axis"], np.int64)
    return graph.node("CumSum", [names[0], axis], reverse=int(equation.params["reverse"]))


def _scan(graph, equation, names, shapes):
    closed, reverse = equation.params["jaxpr"], int(equation.params["reverse"])
    body, inner = graph.inner(), closed.jaxpr.invars
    # The parameters of a scan that count its operands differ between versions of JAX. Its operands are
    # constants, carry and scanned arrays; only the last have a dimension more than in the body.
    stacked = sum(v.aval.ndim > aval.ndim for v, aval in zip(equation.outvars, closed.out_avals, strict=True))
    count = sum(v.aval.ndim > i.aval.ndim for v, i in zip(equation.invars, inner, strict=True))
    first = len(names) - count - (len(equation.outvars) - stacked)
    given = [body.new_name() for _ in inner[first:]]
    results = body.run(closed, *names[:first], *given)
    inputs = [value_info(name, variable.aval) for name, variable in zip(given, inner[first:], strict=True)]
    outputs = []
    for name, aval in zip(results, closed.out_avals, strict=True):
        outputs.append(value_info(body.node("Identity", [name]), aval))  # an output is nobody's input
    if not count:
        raise UnsupportedError("got a scan over nothing; expected an array")
    made = [graph.new_name() for _ in equation.outvars]
    directions = {"scan_input_directions": [reverse] * count} | (
        {"scan_output_directions": [reverse] * stacked} if stacked else {}
    )
    loop = helper.make_graph(body.nodes, "body", inputs, outputs)
    graph.node("Scan", names[first:], made, body=loop, num_scan_inputs=count, **directions)
    return made


def _cond(graph, equation, names, shapes):
    branches = equation.params["branches"]
    if len(branches) != 2:
        raise UnsupportedError(f"got {len(branches)} branches; expected 2")
    graphs = []
    for number, branch in enumerate(branches):
        body = graph.inner()
        results = body.run(branch, *names[1:])
        outputs = [
            value_info(body.node("Identity", [name]), aval)
            for name, aval in zip(results, branch.out_avals, strict=True)
        ]
        graphs.append(helper.make_graph(body.nodes, f"branch{number}", [], outputs))
    made = [graph.new_name() for _ in equation.outvars]
    chosen = _as_bool(graph, names[0])
    graph.node("If", [chosen], made, then_branch=graphs[1], else_branch=graphs[0])
    return made


def _same(operator, graph, equation, names, shapes):
    return graph.node(operator, names)


def _reduce(operator, graph, equation, names, shapes):
    return graph.node(operator, [names[0], graph.ints(*equation.params["axes"])], keepdims=0)


TRANSLATIONS: dict[str, Callable[..., str | list[str]]] = {
    **{name: functools.partial(_same, operator) for name, operator in _SAME.items()},
    **{name: functools.partial(_reduce, operator) for name, operator in _REDUCTIONS.items()},
    "broadcast_in_dim": _broadcast_in_dim,
    "clamp": _clamp,
    "concatenate": _concatenate,
    "cond": _cond,
    "convert_element_type": _cast,
    "cumsum": _cumsum,
    "dim_as_value": _dim_as_value,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "expand_dims": _expand_dims,
    "expm1": _expm1,
    "gather": _gather,
    "integer_pow": _integer_pow,
    "iota": _iota,
    "log1p": _log1p,
    "ne": _ne,
    "pad": _pad,
    "rem": _rem,
    "reshape": _reshape,
    "rev": _rev,
    "round": _round,
    "rsqrt": _rsqrt,
    "scan": _scan,
    "select_n": _select_n,
    "slice": _slice,
    "split": _split,
    "square": _square,
    "squeeze": _squeeze,
    "stack": _stack,
    "transpose": _transpose,
    "unstack": _unstack,
}
