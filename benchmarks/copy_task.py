"""Copy a random map across the image: accuracy of each mixer and gate setting by distance.

python benchmarks/copy_task.py --columns=64,16,32 --seeds=0,1

The right half of a grid holds random symbols, the left half is masked. Each masked token must name the symbol
of its mirror image, up to a whole line of tokens away. In a DiG of four blocks, one scan carries it: that of
the second block, which runs against the rows. Lines of 16, 32 and 64 tokens are those of images of 256, 512
and 1,024 px; grids have 8 lines, which keeps the cost low and changes no distance. Rows are stored in
copy_task.json as soon as they are measured, and a row that is there is not measured again. --draw only draws
docs/images/copy_task.png.
"""

import argparse
import itertools
import json
import pathlib
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Int, Key

from dig_jax import runtime
from dig_jax.models.registry import create_model
from dig_jax.progress import duration

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = pathlib.Path(__file__).with_suffix(".json")
PICTURE = ROOT / "docs" / "images" / "copy_task.png"

SYMBOLS = 8  # chance is 1/8
ROWS = 8  # lines of a grid
TOKENS = 1024  # of a batch, on every grid
EVALUATED = 8  # batches
SIZES = {
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 2,
    "key_expansion": 1.0,
    "mlp_hidden_size": 128,
}  # K = V = 32
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "softmax": {"mixer": "softmax"},
    "gla 16": {},
    "gla 64": {"gate_normalizer": 64},
    "gla grid": {"gate_normalizer": "grid"},
    "gla spread": {"gate_normalizer": "spread"},
    "gla grid, K 64": {"gate_normalizer": "grid", "num_heads": 1},
    "gla*3+softmax": {"mixer": "gla*3+softmax"},
    "gla+local": {"mixer": "gla+local", "window": 7},
}
GATES = ("gla 16", "gla 64", "gla grid", "gla spread")  # differ only in the half-life


def batch(key: Key[Array, ""], columns: int, shown: Int[Array, "b rows"]) -> tuple[Array, Array, Array]:
    """Return images [b, rows, columns, c], the symbol of every token, and the tokens that have one.

    Args:
        key: random key.
        columns: length of a line.
        shown: columns on either side of the axis that hold symbols; the others are masked.
    """
    half = jax.random.randint(key, (*shown.shape, columns // 2), 0, SYMBOLS)
    symbols = jnp.concatenate([half[..., ::-1], half], -1)
    offsets = jnp.arange(columns) - columns // 2
    is_right = offsets >= 0
    used = jnp.where(is_right, offsets, -offsets - 1) < shown[..., None]
    return jax.nn.one_hot(jnp.where(used & is_right, symbols, SYMBOLS), SYMBOLS + 1), symbols, used


def measured(setting: str, columns: int, seed: int, steps: int, rate: float) -> dict[str, Any]:
    """Train a model; return its accuracy at each distance between a token and its source."""
    model = create_model(
        "DiG-S/1",
        input_size=(ROWS, columns),
        num_classes=0,
        in_channels=SYMBOLS + 1,
        learn_sigma=False,
        rngs=nnx.Rngs(seed),
        **{**SIZES, **SETTINGS[setting]},
    )
    graphdef, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    keys = jax.random.split(jax.random.key(seed), 2)
    images = TOKENS // (ROWS * columns)

    def logits(params: Any, tokens: Array) -> Array:
        out = nnx.merge(graphdef, params)(tokens, jnp.zeros(images))
        return out[..., :SYMBOLS]

    def loss_of(params: Any, key: Array) -> Array:
        # Lines of random length: short ones teach to find the mirror image among few symbols.
        shown = jax.random.randint(jax.random.fold_in(key, 1), (images, ROWS), 1, columns // 2 + 1)
        tokens, targets, used = batch(key, columns, shown)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, tokens), targets)
        return losses.mean(where=used)

    @jax.jit
    def step(params: Any, state: Any, number: int) -> tuple:
        loss, gradients = jax.value_and_grad(loss_of)(params, jax.random.fold_in(keys[0], number))
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    def correct(params: Any, number: int) -> Array:
        shown = jnp.full((images, ROWS), columns // 2)
        tokens, targets, _ = batch(jax.random.fold_in(keys[1], number), columns, shown)
        return (logits(params, tokens).argmax(-1) == targets)[..., columns // 2 - 1 :: -1].mean((0, 1))

    state, began, curve = optimizer.init(params), time.process_time(), []
    for number in range(steps):
        params, state, loss = step(params, state, number)
        if (number + 1) % (steps // 20) == 0:
            curve.append(round(float(loss), 4))
            print(
                f"  {setting}, {columns} columns, seed {seed}: step {number + 1}, loss {curve[-1]}",
                flush=True,
            )
    seconds = time.process_time() - began
    accuracy = np.mean([correct(params, number) for number in range(EVALUATED)], axis=0)
    return {
        "setting": setting,
        "columns": columns,
        "seed": seed,
        "steps": steps,
        "loss": curve,
        "distance": list(range(1, columns, 2)),
        "accuracy": [round(float(each), 4) for each in accuracy],
        "mean": round(float(accuracy.mean()), 4),
        "cpu_seconds": round(seconds, 1),
    }


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[int, int], dict[str, list[list[float]]]]:
    """Return the accuracies of the seeds by (columns, steps) and setting."""
    groups: dict = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: (row["columns"], row["steps"], row["seed"])):
        groups[row["columns"], row["steps"]][row["setting"]].append(row["accuracy"])
    return groups


def table(rows: list[dict[str, Any]]) -> str:
    """Return the accuracy of each setting and seed: of all distances, and of the farthest quarter."""
    groups = grouped(rows)
    head = [f"{columns} columns, {steps:,} steps" for columns, steps in groups]
    lines = ["| mixer | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"]
    for setting in sorted({row["setting"] for row in rows}, key=[*SETTINGS].index):
        cells = []
        for group in groups.values():
            means = [
                f"{100 * np.mean(seed):.0f} ({100 * np.mean(seed[-len(seed) // 4 :]):.0f})"
                for seed in group[setting]
            ]
            cells.append(", ".join(means) or "not run")
        lines.append(f"| `{setting}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw accuracy by distance, one panel per length and steps, one line per setting and seed."""
    from matplotlib.figure import Figure

    # A setting alone, such as one that needed more steps, has nothing to be compared with.
    groups = {key: group for key, group in grouped(rows).items() if len(group) > 1}
    figure = Figure(figsize=(max(4 * len(groups), 6), 4.2), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for ((columns, steps), group), axes in zip(groups.items(), panels, strict=True):
        for number, setting in enumerate(SETTINGS):
            if group[setting]:  # seeds differ too much for a mean
                style = {"color": f"C{number}", "linestyle": "-" if setting in GATES else "--"}
                lines = axes.plot(range(1, columns, 2), 100 * np.array(group[setting]).T, **style)
                handles[setting] = lines[0]
        axes.axhline(100 / SYMBOLS, color="#999999", linewidth=0.8, linestyle=":")
        axes.set(
            title=f"lines of {columns} tokens, {steps:,} steps", xlabel="distance in tokens", ylim=(0, 102)
        )
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measure the missing rows, print the table and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", default="|".join(SETTINGS), help="separated by |")
    parser.add_argument("--columns", default="64,16,32")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate")
    parser.add_argument("--record", type=pathlib.Path, default=RECORD)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    runtime.set_numerics()
    runtime.prepare_cpu(1)
    rows = json.loads(options.record.read_text()) if options.record.exists() else []
    done = {(row["setting"], row["columns"], row["seed"]) for row in rows if row["steps"] >= options.steps}
    wanted = itertools.product(
        map(int, options.seeds.split(",")), map(int, options.columns.split(",")), options.settings.split("|")
    )
    missing = [(s, g, n) for n, g, s in wanted if (s, g, n) not in done and not options.draw]
    began = time.monotonic()
    for number, (setting, columns, seed) in enumerate(missing):
        rows.append(measured(setting, columns, seed, options.steps, options.rate))
        options.record.write_text(json.dumps(rows, indent=1) + "\n")
        left = (time.monotonic() - began) / (number + 1) * (len(missing) - number - 1)
        name = f"{setting}, {columns} columns, seed {seed}: {rows[-1]['mean']:.3f}"
        print(f"{number + 1}/{len(missing)} {name}, ETA {duration(left)}", flush=True)
    print(table(rows))
    draw(rows, PICTURE)


if __name__ == "__main__":
    main()
