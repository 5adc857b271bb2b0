"""The recurrence and its gradients in NumPy and float64, written by hand, and inputs to try them on."""

import jax.numpy as jnp
import numpy as np

GATES = ("dig", "strong", "reset_60", "reset_1e4", "none")
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dinitial_state")


def gates(kind, rng, shape):
    """Log decays: as in DiG, strong ones, resets between almost none, none."""
    noise, is_reset = rng.standard_normal(shape), rng.random(shape) < 0.1
    return {
        "dig": -np.logaddexp(0, -noise) / 16,
        "strong": -np.logaddexp(0, -4 * noise),
        "reset_60": np.where(is_reset, -60.0, -1e-4),
        "reset_1e4": np.where(is_reset, -1e4, -1e-4),
        "none": np.zeros(shape),
    }[kind]


def inputs(seed, b=2, t=20, h=1, k=16, v=16, gate="dig", dtype=jnp.float32, gate_dtype=jnp.float32):
    """Random (q, k, v, g, initial_state) and cotangents (of o, of the final state)."""
    rng = np.random.default_rng(seed)
    queries, keys, values, do = (jnp.asarray(rng.standard_normal((b, t, h, n)), dtype) for n in (k, k, v, v))
    g = jnp.asarray(gates(gate, rng, (b, t, h, k)), gate_dtype)
    state, d_state = (jnp.asarray(rng.standard_normal((b, h, k, v)), jnp.float32) for _ in range(2))
    return (queries, keys, values, g, state), (do, d_state)


def recurrence(arrays, cotangents=None, *, scale=None, segment_ids=None, reverse=False):
    """S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t.

    Returns a dict of o and final_state, with cotangents also of the gradients of q, k, v, g, initial_state.
    """
    q, k, v, g, state = (np.asarray(x, np.float64) for x in arrays)
    tokens = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    order = range(tokens)[::-1] if reverse else range(tokens)
    o = np.zeros_like(v)
    before, decay, after = {}, {}, {}
    previous = None
    for t in order:
        decay[t] = np.exp(g[:, t])[..., None]
        if segment_ids is not None and previous is not None:
            same = np.asarray(segment_ids)[:, t] == np.asarray(segment_ids)[:, previous]
            decay[t] = decay[t] * same[:, None, None, None]
        before[t] = state
        state = after[t] = decay[t] * state + k[:, t, ..., None] * v[:, t, :, None]
        o[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
        previous = t
    results = {"o": o, "final_state": state}
    if cotangents is None:
        return results
    do, d_state = (np.asarray(x, np.float64) for x in cotangents)
    dq, dk, dv, dg = (np.zeros_like(x) for x in (q, k, v, g))
    for t in reversed(order):
        dq[:, t] = scale * np.einsum("bhkv,bhv->bhk", after[t], do[:, t])
        d_state = d_state + scale * q[:, t, ..., None] * do[:, t, :, None]
        dk[:, t] = np.einsum("bhkv,bhv->bhk", d_state, v[:, t])
        dv[:, t] = np.einsum("bhkv,bhk->bhv", d_state, k[:, t])
        d_state = decay[t] * d_state
        dg[:, t] = np.sum(d_state * before[t], axis=-1)
    return results | {"dq": dq, "dk": dk, "dv": dv, "dg": dg, "dinitial_state": d_state}


def assert_close(actual, expected, tolerance, names=NAMES):
    """Relative error in root mean square of every array, all zeros if that is expected."""
    for name, a, e in zip(names, actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, name
        error, size = np.sqrt(np.mean((a - e) ** 2)), np.sqrt(np.mean(e**2))
        assert error <= tolerance * size, f"{name}: relative error {error / size if size else error:.1e}"
