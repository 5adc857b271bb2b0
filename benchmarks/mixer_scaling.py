"""Time the forward pass of both token mixers for growing numbers of tokens, at the width of DiG-S.

    python benchmarks/mixer_scaling.py

Prints the minimum time over repeats, and its growth since the first row divided by the growth in tokens:
1 is linear. Run it on an otherwise idle machine.
"""

import math
import time

import jax
import jax.numpy as jnp
from flax import nnx

from dig_jax.models.mixers import GatedLinearAttention, SoftmaxAttention
from dig_jax.runtime import prepare_cpu

WIDTH, HEADS = 384, 6
TOKENS = (1024, 2048, 4096, 8192, 16384)
# At 16,384 tokens softmax attention needs 6.4 GB for its scores and takes a minute.
SOFTMAX_TOKENS = 8192


def seconds(mixer: nnx.Module, tokens: int, budget: float = 6.0) -> float:
    """Return the least time of a forward pass, repeated for `budget` seconds and at least 5 times."""
    rows = 2 ** (int(math.log2(tokens)) // 2)
    grid = (rows, tokens // rows)
    graphdef, params = nnx.split(mixer)
    forward = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, grid))
    x = jax.random.normal(jax.random.key(0), (1, tokens, WIDTH))
    forward(params, x).block_until_ready()
    best, repeats, end = math.inf, 0, time.perf_counter() + budget
    while repeats < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        forward(params, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
        repeats += 1
    return best


def main() -> None:
    """Measure and print the table."""
    prepare_cpu(1)  # as main.py does; otherwise page faults distort the times
    rngs = nnx.Rngs(0)
    options = {"dtype": jnp.float32, "rngs": rngs}
    gla = {
        direction: GatedLinearAttention(WIDTH, num_heads=HEADS, direction=direction, **options)
        for direction in ("row", "column_reversed")
    }
    mixers = {**gla, "softmax": SoftmaxAttention(WIDTH, num_heads=HEADS, **options)}
    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}, width {WIDTH}, {HEADS} heads, float32, batch 1")
    print("tokens " + "".join(f"{name + ' ms':>20}{'growth':>8}" for name in mixers))
    first: dict[str, float] = {}
    for tokens in TOKENS:
        row = f"{tokens:6} "
        for name, mixer in mixers.items():
            if name == "softmax" and tokens > SOFTMAX_TOKENS:
                row += f"{'-':>20}{'-':>8}"
                continue
            taken = seconds(mixer, tokens)
            first.setdefault(name, taken)
            row += f"{taken * 1e3:20.1f}{taken / first[name] * TOKENS[0] / tokens:8.2f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
