"""A JAX function as an ONNX graph, node by node from its jaxpr.

`lax.scan` becomes ONNX's Scan and `lax.cond` its If, so that a loop stays a loop. The first axis of inputs
may be the symbol b; nodes that need its value read it from the first input.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from onnx import helper, numpy_helper

from dig_jax.export.onnx_operators import TRANSLATIONS, UnsupportedError, multiple, value_info

OPSET, IR_VERSION = 20, 10

# Primitives that only call another jaxpr: name -> parameter.
_CALLS = {
    "checkpoint": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "jit": "jaxpr",
    "remat2": "jaxpr",
}
_PASSES = ("optimization_barrier", "sharding_constraint")


def to_onnx(
    function: Callable[..., Any], inputs: Mapping[str, jax.ShapeDtypeStruct], output: str
) -> onnx.ModelProto:
    """Convert a function with one result.

    Args:
        function: a function of arrays. Arrays that it closes over become initializers.
        inputs: names, shapes and dtypes of the arguments.
        output: name of the result.

    Raises:
        UnsupportedError: a primitive has no translation.
    """
    jaxpr = jax.make_jaxpr(function)(*inputs.values())
    graph = _Graph()
    graph.bind(jaxpr.jaxpr.invars, inputs)
    graph.first_input = next(iter(inputs))
    (result,) = graph.run(jaxpr)
    graph.node("Identity", [result], outputs=[output])
    made = helper.make_graph(
        graph.nodes,
        "sampler",
        [value_info(name, spec) for name, spec in inputs.items()],
        [value_info(output, jaxpr.out_avals[0])],
        graph.root.initializers,
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(made, opset_imports=opset, ir_version=IR_VERSION, producer_name="dig_jax")
    onnx.checker.check_model(model)
    return model


class _Graph:
    """Nodes of a graph, or of the body of a loop or branch, which sees the names of the outer graphs."""

    def __init__(self, outer: "_Graph | None" = None):
        self.root: _Graph = self if outer is None else outer.root
        self.names: dict[Any, str] = {} if outer is None else dict(outer.names)
        self.nodes: list[onnx.NodeProto] = []
        if outer is None:
            self.first_input, self.count = "", 0
            self.initializers: list[onnx.TensorProto] = []
            self.constants: dict[Any, str] = {}
            self.shapes: dict[str, str] = {}

    def bind(self, variables: Sequence[Any], names: Sequence[str] | Mapping[str, Any]) -> None:
        self.names.update(zip(variables, names, strict=True))

    def inner(self) -> "_Graph":
        """Return a graph that sees the names of this one."""
        return _Graph(self)

    def new_name(self) -> str:
        self.root.count += 1
        return f"v{self.root.count}"

    def node(
        self, op: str, inputs: Sequence[str], outputs: Sequence[str] | int = 1, **attributes: Any
    ) -> str:
        """Add a node and return the name of its first output."""
        names = [self.new_name() for _ in range(outputs)] if isinstance(outputs, int) else outputs
        self.nodes.append(helper.make_node(op, inputs, names, **attributes))
        return names[0]

    def constant(self, value: Any, dtype: Any = None) -> str:
        """Return the name of an initializer; equal ones are shared."""
        array = np.array(value, dtype, order="C")
        key = array.dtype.str, array.shape, hashlib.sha256(array.data).digest()
        if key not in self.root.constants:
            self.root.constants[key] = name = self.new_name()
            self.root.initializers.append(numpy_helper.from_array(array, name))
        return self.root.constants[key]

    def ints(self, *values: Any) -> str:
        return self.constant(values, np.int64)

    def shape(self, sizes: Sequence[Any]) -> str:
        """Return the name of a shape, whose sizes may be multiples of b."""
        if all(isinstance(size, int | np.integer) for size in sizes):
            return self.ints(*sizes)
        root, key = self.root, str(tuple(sizes))
        if key not in root.shapes:
            if "b" not in root.shapes:
                root.shapes["b"] = root.node("Shape", [root.first_input], start=0, end=1)
            parts = [
                root.ints(size) if k is None else root.node("Mul", [root.shapes["b"], root.ints(k)])
                for size in sizes
                for k in [multiple(size)]
            ]
            root.shapes[key] = root.node("Concat", parts, axis=0)
        return root.shapes[key]

    def read(self, atom: Any) -> str:
        aval: Any = atom.aval
        return self.constant(atom.val, aval.dtype) if isinstance(atom, Literal) else self.names[atom]

    def run(self, jaxpr: ClosedJaxpr | Jaxpr, *arguments: str) -> list[str]:
        """Add the nodes of a jaxpr and return the names of its results."""
        if isinstance(jaxpr, ClosedJaxpr):
            self.bind(jaxpr.jaxpr.constvars, [self.constant(value) for value in jaxpr.consts])
            jaxpr = jaxpr.jaxpr
        if arguments:
            self.bind(jaxpr.invars, arguments)
        for equation in jaxpr.eqns:
            results = self.translate(equation, [self.read(atom) for atom in equation.invars])
            self.bind(equation.outvars, [results] if isinstance(results, str) else results)
        return [self.read(atom) for atom in jaxpr.outvars]

    def translate(self, equation: JaxprEqn, names: list[str]) -> str | list[str]:
        primitive = equation.primitive.name
        if primitive in _CALLS:
            return self.run(equation.params[_CALLS[primitive]], *names)
        if primitive in _PASSES:
            return names
        if primitive not in TRANSLATIONS:
            raise UnsupportedError(f"got JAX's primitive {primitive!r}, which has no translation")
        avals: list[Any] = [atom.aval for atom in equation.invars]
        return TRANSLATIONS[primitive](self, equation, names, [aval.shape for aval in avals])
