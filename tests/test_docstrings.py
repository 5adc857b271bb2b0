"""Public names have docstrings: shapes in the signature, arguments, errors, and the source of formulas."""

import ast
import inspect
import re
import sys
import textwrap

import jax
import numpy as np
import pallas_gla
import pallas_gla.fla
import pallas_gla.selective_scan
import pytest
from public_modules import MODULES

import dig_jax
import dig_jax.autoencoder

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in MODULES
    for name in module.__all__
    if not inspect.ismodule(getattr(module, name))
} | {f"pallas_gla.fla.{name}": getattr(pallas_gla.fla, name) for name in ("chunk_gla", "fused_recurrent_gla")}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
# Names that hold values and no docstring of their own: a string below the assignment describes them.
VALUES = {"dig_jax.diffusion.SAMPLERS": "samplers/registry.py", "dig_jax.diffusion.Denoiser": "process.py"}
# Formulas come from a paper or from another code base.
FORMULAS = sorted(
    name
    for name in PUBLIC
    if re.match(r"dig_jax\.(diffusion|evaluation)\.|pallas_gla\.", name)
    and not re.search(
        r"(?:make_\w+|load_features|SAMPLERS|Denoiser|Process|BaseSampler|digits|nearest\w+)$", name
    )
)
SOURCE = re.compile(r"\b(?:19[5-9]\d|20[0-3]\d)\b|\bADM\b|torch-fidelity|flash-linear-attention")


def methods():
    """Yield (name, function, class) of the public methods and properties that a public class defines."""
    for name, owner in CLASSES.items():
        for attribute, value in vars(owner).items():
            value = (
                getattr(value, "fget", None)
                or getattr(value, "func", None)
                or getattr(value, "__func__", value)
            )
            if inspect.isfunction(value) and (attribute == "__call__" or not attribute.startswith("_")):
                yield pytest.param(value, owner, id=f"{name}.{attribute}")


def raised(function) -> set[str]:
    """Return the names of the exceptions that the body of a function raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    found = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    called = [error.func if isinstance(error, ast.Call) else error for error in found]
    return {error.id for error in called if isinstance(error, ast.Name) and error.id[0].isupper()}


def undocumented(function, text: str) -> list[str]:
    """Return the parameters that a docstring does not name."""
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    return [name for name in names if not re.search(rf"\b{name}\b", text)]


def docstrings(owner) -> str:
    """Return the docstrings of a class, its bases and the classes that they name, and of their methods."""
    classes = [each for each in owner.__mro__ if each.__module__.startswith(("dig_jax", "pallas_gla"))]
    named = "".join(each.__doc__ for each in classes)
    classes += [each for each in CLASSES.values() if f"`{each.__name__}`" in named]
    functions = [getattr(value, "__func__", value) for each in classes for value in vars(each).values()]
    return "\n".join(
        inspect.getdoc(each) or "" for each in [*classes, *filter(inspect.isfunction, functions)]
    )


def bare_arrays(function) -> list[str]:
    """Return the parameters that are arrays without a shape."""
    parameters = inspect.signature(function).parameters.items()
    return [name for name, parameter in parameters if parameter.annotation in (jax.Array, np.ndarray)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_documents_arguments_shapes_and_errors(name):
    function = FUNCTIONS[name]
    text = inspect.getdoc(function) or ""
    assert text
    assert undocumented(function, text) == []
    assert bare_arrays(function) == []
    assert {error for error in raised(function) if error not in text} == set()


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_a_docstring_of_its_own(name):
    text = CLASSES[name].__doc__ or ""
    assert text
    assert not text.startswith(CLASSES[name].__name__ + "(")  # what dataclasses generate


@pytest.mark.parametrize(("function", "owner"), list(methods()))
def test_a_method_is_documented_and_its_class_names_its_arguments(function, owner):
    text = inspect.getdoc(function) or ""
    assert text
    assert undocumented(function, docstrings(owner)) == []
    assert bare_arrays(function) == []
    assert {error for error in raised(function) if error not in text + (owner.__doc__ or "")} == set()


@pytest.mark.parametrize("name", VALUES)
def test_a_value_is_described_below_its_assignment(name):
    path = inspect.getsourcefile(dig_jax.diffusion).replace("__init__.py", VALUES[name])
    with open(path) as file:
        statements = ast.parse(file.read()).body
    (index,) = [
        index
        for index, statement in enumerate(statements)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        and name.rpartition(".")[2] in ast.unparse(statement).split("=")[0].split(":")[0]
    ]
    following = statements[index + 1]
    assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_names_its_source(name):
    value = PUBLIC[name]
    module = sys.modules[value.__module__].__doc__ or ""
    assert SOURCE.search((inspect.getdoc(value) or "") + module), f"{name} names no paper or code"


def test_the_checks_find_what_is_missing():
    def function(x: jax.Array, y: np.ndarray, scale: float = 1.0):
        """Add two arrays, for a `scale`."""
        if scale < 0:
            raise ValueError(scale)

    text = inspect.getdoc(function)
    assert raised(function) == {"ValueError"}
    assert bare_arrays(function) == ["x", "y"]
    assert undocumented(function, f"{text} The rest is as in `add`.") == ["x", "y"]
    assert not SOURCE.search("See the README; there are 2048 features.")
