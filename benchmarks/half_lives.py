"""Draw the half-lives of GLA's states in every block and head, at initialization and after training.

python benchmarks/half_lives.py WORKDIR --out=docs/images/half_lives.png

A half-life is the number of tokens after which a decay, taken as constant, halves the state: log 2 / -g for
each token and key channel. The tokens are those of training images at evenly spread times.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from dig_jax.components import Components, Params  # noqa: E402
from dig_jax.data.pipeline import normalize  # noqa: E402
from dig_jax.models.mixers import gla  # noqa: E402
from dig_jax.models.registry import find_model  # noqa: E402
from dig_jax.sampling.sampler import load  # noqa: E402
from dig_jax.training.state import init_params  # noqa: E402

HalfLives = list[Float[np.ndarray, "tokens heads keys"]]
_RANGE = (1.0, 4096.0)  # tokens; others are drawn at its ends


def half_lives(components: Components, params: Params, num_images: int) -> HalfLives:
    """Return the half-lives of each block that has GLA, in the order of the blocks, on training images."""
    source, process = components.train_source, components.diffusion
    examples = [source[index * len(source) // num_images] for index in range(num_images)]
    images = jnp.asarray(normalize(np.stack([example["image"] for example in examples])))
    labels = jnp.asarray([example["label"] for example in examples])
    noise = jax.random.normal(jax.random.key(0), images.shape)
    times = process.times_at((jnp.arange(num_images) + 0.5) / num_images)
    found: HalfLives = []

    def keep(decay: Float[Array, "b t h k"]) -> None:
        flat = np.asarray(decay).reshape(-1, *decay.shape[2:])
        found.append(-np.log(2) / np.minimum(flat, -1e-9))

    def scalar_gate(q: Array, k: Array, v: Array, logits: Array, *rest: Array, **options) -> Array:
        decay = jax.nn.log_sigmoid(logits.astype(jnp.float32)) / options["gate_normalizer"]
        jax.debug.callback(keep, decay, ordered=True)
        return original[0](q, k, v, logits, *rest, **options)

    def gate_per_head(q: Array, k: Array, v: Array, decay: Array, **options) -> Array:
        jax.debug.callback(keep, decay, ordered=True)
        return original[1](q, k, v, decay, **options)

    original = gla.gated_gla_2d, gla.gla_2d
    gla.gated_gla_2d, gla.gla_2d = scalar_gate, gate_per_head
    try:
        x_t = process.corrupt(images, noise, times)
        jax.block_until_ready(components.denoise(params, x_t, process.timestep_input(times), labels))
        jax.effects_barrier()
    finally:
        gla.gated_gla_2d, gla.gla_2d = original
    return found


def draw(before: HalfLives, after: HalfLives, lines: Sequence[float], path: pathlib.Path) -> None:
    """Draw one panel per block: a histogram of each head after training, and an outline of all before.

    Args:
        before: half-lives at initialization.
        after: half-lives after training.
        lines: tokens of a line and of the whole image, drawn as vertical lines.
        path: the picture.
    """
    from matplotlib.figure import Figure

    bins = np.geomspace(*_RANGE, 73)
    columns = min(len(after), 4)
    rows = -(-len(after) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.3 * rows + 0.5), dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for block, (first, last, axes) in enumerate(zip(before, after, panels, strict=False)):
        _histogram(axes, first, bins, histtype="step", color="black", label="initial")
        for head in range(last.shape[1]):
            _histogram(axes, last[:, head], bins, alpha=0.55, color=f"C{head}", label=f"head {head}, trained")
        for line in lines:
            axes.axvline(line, color="#999999", linewidth=0.8)
        axes.set(xscale="log", title=f"block {block}", yscale="log", ylim=(0.02, 100))
        axes.spines[["top", "right"]].set_visible(False)
        if block >= len(after) - columns:
            axes.set_xlabel("half-life in tokens")
    figure.supylabel("% of tokens and channels", fontsize="medium")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def _histogram(axes: Any, values: np.ndarray, bins: Float[np.ndarray, " n"], **style: Any) -> None:
    flat = np.clip(values.ravel(), *_RANGE)
    axes.hist(flat, bins, weights=np.full(flat.size, 100 / flat.size), **style)


def main() -> None:
    """Draw the picture of a run, and print quantiles of each block."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, default="half_lives.png")
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args()
    sampler = load(options.workdir)
    components = sampler.components
    before = half_lives(components, init_params(components), options.images)
    after = half_lives(components, sampler.params, options.images)
    if not after:
        raise SystemExit(f"no blocks with GLA: got {components.config.model.name}; expected DiG or U-DiG")
    for block, (first, last) in enumerate(zip(before, after, strict=True)):
        for name, values in (("initial", first), ("trained", last)):
            quantiles = np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95), axis=(0, 2)).T.round(1)
            print(json.dumps({"block": block, "at": name, "quantiles by head": quantiles.tolist()}))
    height, width, _ = components.image_spec.image_shape
    patch = components.config.model.patch_size or find_model(components.config.model.name)[2]
    draw(before, after, (width / patch, height * width / patch**2), options.out)


if __name__ == "__main__":
    main()
