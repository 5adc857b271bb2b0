"""Time `gla` on a CPU against other ways to compute it, interleaved in one run.

    python kernels/benchmarks/cpu.py [--tokens=256,1024,4096] [--dtypes=float32,bfloat16] [--repeats=20]

Prints a Markdown table of the smallest CPU time of the process, the smallest wall time, and the temporary
memory of the compiled program. Each time is the mean over calls of at least 20 ms. Compare rows of one run
only. jax-linear-attention is optional:

    pip install --no-deps --ignore-requires-python --target=DIR jax-linear-attention==0.1.0
    PYTHONPATH=kernels:DIR python kernels/benchmarks/cpu.py
"""

import argparse
import functools
import importlib.util
import time

import jax
import jax.numpy as jnp
from pallas_gla import gla

# DiG-S on two images, and a batch of the digits on one of two devices.
BATCH, HEADS, KEYS, VALUES = 2, 6, 32, 64
DIGITS = (32, 16, 2, 24, 48)
CHUNK = 64


def lax_scan(q, k, v, g):
    """Run the recurrence token by token."""

    def step(state, token):
        q, k, v, g = (x.astype(jnp.float32) for x in token)
        state = jnp.exp(g)[..., None] * state + k[..., None] * v[..., None, :]
        return state, jnp.sum(q[..., None] * state, axis=-2)

    state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[3]))
    o = jax.lax.scan(step, state, [x.swapaxes(0, 1) for x in (q, k, v, g)])[1]
    return (q.shape[3] ** -0.5 * o.swapaxes(0, 1)).astype(v.dtype)


def textbook(q, k, v, g):
    """Run in chunks with exp(G) and exp(-G) of cumulative sums G, which overflows for strong decays."""
    batch, tokens, heads, width = q.shape
    size = min(CHUNK, tokens)

    def split(x):
        x = x.astype(jnp.float32).reshape(batch, tokens // size, size, heads, -1)
        return x.transpose(1, 0, 3, 2, 4)

    q, k, v32, g = map(split, (width**-0.5 * q, k, v, g))
    sums = jnp.cumsum(g, axis=3)
    last = sums[..., -1:, :]
    queries, keys, to_end = q * jnp.exp(sums), k * jnp.exp(-sums), k * jnp.exp(last - sums)
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step(state, chunk):
        queries, keys, to_end, v, decay = chunk
        scores = jnp.tril(dot("bhik,bhjk->bhij", queries, keys))
        o = dot("bhij,bhjv->bhiv", scores, v) + dot("bhik,bhkv->bhiv", queries, state)
        return decay[..., None] * state + dot("bhjk,bhjv->bhkv", to_end, v), o

    state = jnp.zeros((batch, heads, width, v.shape[3]))
    o = jax.lax.scan(step, state, (queries, keys, to_end, v32, jnp.exp(last[..., 0, :])))[1]
    return o.transpose(1, 0, 3, 2, 4).reshape(v.shape).astype(v.dtype)


def naive_chunks(q, k, v, g):
    """Run the naive chunk form of flash-linear-attention.

    Chunks of 16 tokens; the scores are sums over channels of q k exp(G_i - G_j).
    """
    batch, tokens, heads, width = q.shape

    def split(x):
        x = x.astype(jnp.float32).reshape(batch, tokens // 16, 16, heads, -1)
        return x.transpose(1, 0, 3, 2, 4)

    causal = jnp.tril(jnp.ones((16, 16), bool))[None, None, :, :, None]
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step(state, chunk):
        q, k, v, g = chunk
        sums = jnp.cumsum(g, axis=2)
        between = jnp.where(causal, sums[:, :, :, None] - sums[:, :, None], -jnp.inf)
        scores = jnp.sum(q[:, :, :, None] * k[:, :, None] * jnp.exp(between), axis=-1)
        o = dot("bhij,bhjv->bhiv", scores, v) + dot("bhik,bhkv->bhiv", q * jnp.exp(sums), state)
        last = sums[:, :, -1:]
        to_end = dot("bhjk,bhjv->bhkv", k * jnp.exp(last - sums), v)
        return jnp.exp(last[:, :, 0])[..., None] * state + to_end, o

    state = jnp.zeros((batch, heads, width, v.shape[3]))
    o = jax.lax.scan(step, state, (split(width**-0.5 * q), split(k), split(v), split(g)))[1]
    return o.transpose(1, 0, 3, 2, 4).reshape(v.shape).astype(v.dtype)


def softmax(q, k, v, g):
    """Run causal softmax attention, with q and k padded to the width of v."""
    del g
    widths = [(0, 0)] * 3 + [(0, v.shape[3] - q.shape[3])]
    return jax.nn.dot_product_attention(jnp.pad(q, widths), jnp.pad(k, widths), v, is_causal=True)


def implementations(tokens):
    """Return the functions to time, by name. Softmax attention over 4,096 tokens needs 3 GB and a minute."""
    found = {"default": gla, '`"xla"`': functools.partial(gla, implementation="xla")}
    found["default, one decay of -40"] = lambda q, k, v, g: gla(q, k, v, g.at[0, tokens // 2, 0, 0].set(-40))
    found["default, decays of -5"] = lambda q, k, v, g: gla(q, k, v, g - 5)
    found['`"xla"`, decays of -5'] = lambda q, k, v, g: gla(q, k, v, g - 5, implementation="xla")
    found |= {"`lax.scan`": lax_scan, "textbook": textbook, "naive chunks": naive_chunks}
    if tokens <= 1024:
        found["softmax"] = softmax
    if importlib.util.find_spec("jla"):
        from jla.ops.chunked import gla as jla

        found["jax-linear-attention"] = lambda *arrays: jla(*arrays)[0]
    return found


def programs(arrays, d_out):
    """Compile the forward pass and the forward and backward pass of every implementation."""
    compiled = {}
    for name, function in implementations(arrays[0].shape[1]).items():

        def both(*arrays, function=function):
            o, vjp = jax.vjp(function, *arrays[:4])
            return o, vjp(arrays[4])

        for what, run, inputs in (("f", function, arrays), ("f+b", both, (*arrays, d_out))):
            compiled[name, what] = jax.jit(run).lower(*inputs).compile(), inputs
    return compiled


def measure(compiled, repeats):
    """Return the smallest CPU and wall time of every program, in seconds, measured in turn.

    A time is the mean over calls of at least 20 ms together, because a process's CPU time advances in steps.
    As many untimed calls come first, because the program before has filled the caches and given memory back.
    """
    best = dict.fromkeys(compiled, (float("inf"),) * 2)
    for _ in range(repeats):
        for key, (run, inputs) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*inputs))
            calls = 1 + int(0.02 / (time.perf_counter() - start))
            for _ in range(2):
                start = time.process_time(), time.perf_counter()
                for _ in range(calls):
                    jax.block_until_ready(run(*inputs))
                took = (time.process_time() - start[0]) / calls, (time.perf_counter() - start[1]) / calls
            best[key] = tuple(map(min, best[key], took))
    return best


def report(shape, dtype, repeats):
    """Print the rows of one shape."""
    batch, tokens, heads, keys, values = shape
    sizes = (keys, keys, values, keys, values)
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, g, d_out = (
        jax.random.normal(key, (batch, tokens, heads, size), dtype)
        for key, size in zip(keys, sizes, strict=True)
    )
    compiled = programs((q, k, v, jax.nn.log_sigmoid(g) / 16), d_out)
    for run, inputs in compiled.values():
        jax.block_until_ready(run(*inputs))
    best = measure(compiled, repeats)
    for name in implementations(tokens):
        cells = [f"{batch}, {tokens}, {heads}", dtype, name]
        cells += [" / ".join(f"{1e3 * best[name, what][i]:.1f}" for what in ("f", "f+b")) for i in (0, 1)]
        memory = [compiled[name, what][0].memory_analysis().temp_size_in_bytes / 1e6 for what in ("f", "f+b")]
        cells.append(" / ".join(f"{x:.1f}" for x in memory))
        print(f"| {' | '.join(cells)} |", flush=True)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="256,1024,4096")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--repeats", type=int, default=20)
    flags = parser.parse_args()
    shapes = [(BATCH, int(tokens), HEADS, KEYS, VALUES) for tokens in flags.tokens.split(",")]
    print("| B, T, H | dtype | implementation | CPU ms, f / f+b | wall ms, f / f+b | temporary MB, f / f+b |")
    print("|---|---|---|---|---|---|")
    for dtype in flags.dtypes.split(","):
        for shape in (*shapes, DIGITS):
            report(shape, dtype, flags.repeats)


if __name__ == "__main__":
    main()
