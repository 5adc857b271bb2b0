"""Upstream's golden parameters, and the command that converts files."""

import contextlib
import functools
import io
import logging

import jax
import numpy as np
from flax import nnx, traverse_util
from test_convert import GOLDEN, fresh

from dig_jax.convert.command import main
from dig_jax.convert.names import read_params
from dig_jax.files.safetensors import StoredArray

HEADS = {"dit": ["--num_heads=1"]}  # its parameters do not show the heads


def state_dict(case):
    """The golden parameters, float32, as upstream saves them."""
    data = np.load(GOLDEN / f"{case}.npz")
    return {name[6:]: data[name].astype(np.float32) for name in data if name.startswith("param/")}


@functools.cache
def abstract(case):
    return nnx.eval_shape(lambda: fresh(case))


@functools.cache
def expected(case):
    """Our parameters for the golden outputs."""
    stored = {name: StoredArray(x.shape, "float32", lambda x=x: x) for name, x in state_dict(case).items()}
    return traverse_util.unflatten_dict(read_params(abstract(case), stored))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def run(*arguments, status=0):
    """Run the command; its log goes to the current standard error."""
    root, absl = logging.getLogger(), logging.getLogger("absl")
    level, absl_level, handlers = root.level, absl.level, list(root.handlers)
    try:
        assert main([str(argument) for argument in arguments]) == status
    finally:
        root.handlers = handlers
        root.setLevel(level)
        absl.setLevel(absl_level)


def refused(*arguments, status):
    """Run a command that must fail; return its error line."""
    with contextlib.redirect_stderr(io.StringIO()) as log:
        run(*arguments, status=status)
    lines = log.getvalue().splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


def assert_upstreams(arrays, case):
    assert arrays.keys() == state_dict(case).keys() | {"pos_embed"}
    for name, array in state_dict(case).items():
        if name == "pos_embed":  # the golden one is rounded to float16
            np.testing.assert_allclose(arrays[name], array, atol=1e-3)
        else:
            np.testing.assert_array_equal(arrays[name], array)
