"""Write a sampler of the page "Digits in your browser" from a workdir of configs/digits.py.

python docs/browser/make_model.py runs/digits digits.onnx
python docs/browser/make_model.py runs/one_step digits_one_step.onnx

Large weights are stored as int8 with one scale per output channel, a quarter of the bytes; the graph first
converts them to float32.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

import dig_jax
from dig_jax.export.onnx import onnx_model

SMALL = 1024  # elements of an array that stays float32


def with_int8_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with large float32 initializers as int8 and one scale along the last axis."""
    kept, nodes = [], []
    for initializer in model.graph.initializer:
        array = numpy_helper.to_array(initializer)
        if array.dtype != np.float32 or array.size <= SMALL or array.ndim < 2:
            kept.append(initializer)
            continue
        axes = tuple(range(array.ndim - 1))
        scale = np.maximum(np.abs(array).max(axes), 1e-12) / 127
        name = initializer.name
        kept.append(numpy_helper.from_array(np.round(array / scale).astype(np.int8), f"{name}_int8"))
        kept.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}_scale"))
        inputs = [f"{name}_int8", f"{name}_scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], axis=array.ndim - 1))
    nodes += model.graph.node
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(kept)
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


if __name__ == "__main__":
    model = onnx.load_from_string(onnx_model(dig_jax.load(sys.argv[1])))
    onnx.save(with_int8_weights(model), Path(__file__).with_name(sys.argv[2]))
