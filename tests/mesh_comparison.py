"""A program for eight devices: compare loss and gradients on meshes with one device; print JSON."""

import functools
import json
import re
import sys

import jax
import numpy as np

from dig_jax.parallel import distribute, make_mesh, replicated, state_sharding
from dig_jax.testing import random_params, tiny_components, tiny_settings
from dig_jax.training.step import mean_gradient
from dig_jax.training.train_setup import TrainSetup

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
SIZE = 16


def compare(name: str, depth: int, meshes: list[dict[str, int]]) -> list[dict]:
    """For each mesh: relative errors, kinds of collectives, and the size of the largest gathered array."""
    components = tiny_components(
        model__name=name,
        model__depth=depth,
        model__hidden_size=64,
        model__num_heads=1 if name.startswith("DiS") else 2,
        data__options={"image_size": 16, "channels": 1, "num_classes": 5, "length": 60},
    )
    params = random_params(components)
    image = np.random.default_rng(0).standard_normal((SIZE, 16, 16, 1)).astype(np.float32)
    batch = {"image": image, "label": np.arange(SIZE, dtype=np.int32) % 5}

    setup, key = TrainSetup.of(components), jax.random.key(3)

    def gradient(params, batch):
        grads, metrics = mean_gradient(setup, params, batch, key)
        return metrics["loss"], grads

    expected = jax.device_get(jax.jit(gradient)(params, batch))
    results = []
    for axes in meshes:
        mesh = make_mesh(tiny_settings(**{f"mesh__{axis}": n for axis, n in axes.items()}).mesh, SIZE)
        layout = state_sharding(params, mesh)
        with jax.set_mesh(mesh):
            arguments = (jax.device_put(params, layout), distribute(batch, mesh))
            # A new function object, so that jit does not reuse the trace for one device.
            run = jax.jit(functools.partial(gradient), out_shardings=(replicated(mesh), layout))
            compiled = run.lower(*arguments).compile()
            loss, grads = jax.device_get(compiled(*arguments))
        pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1]), strict=True))
        moved = re.findall(rf" = (.*?) ({KINDS})(?:-start)?\(", compiled.as_text())
        results.append(
            {
                "loss": abs(float(loss / expected[0]) - 1),
                "gradient": distance(pairs),
                "worst parameter": max(distance([pair]) for pair in pairs),
                "collectives": sorted({kind for _, kind in moved}),
                "gathered": max([0, *(elements(shape) for shape, kind in moved if kind == "all-gather")]),
                "largest parameter": max(x.size for x in jax.tree.leaves(params)),
            }
        )
    return results


def distance(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The relative distance over all arrays together."""
    difference, norm = (
        np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays))
        for arrays in ([a - b for a, b in pairs], [b for _, b in pairs])
    )
    return float(difference / norm)


def elements(shape: str) -> int:
    """Number of elements of the largest array in an HLO shape."""
    sizes = [[int(n) for n in text.split(",") if n] for text in re.findall(r"\w+\[([\d,]*)\]", shape)]
    return int(max(np.prod(size) for size in sizes))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compare(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))))
