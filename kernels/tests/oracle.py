"""GLA and its gradients in NumPy and float64, written out by hand, and random inputs."""

import jax.numpy as jnp
import numpy as np

GATES = ("dig", "strong", "reset_60", "reset_1e4", "none")
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "dinitial_state")
GATED_NAMES = (*NAMES, "dout_gate", "dnorm_weight")


def gates(kind, rng, shape):
    """Random log decays: weak ones as in DiG, strong ones, occasional resets, or none."""
    noise, is_reset = rng.standard_normal(shape), rng.random(shape) < 0.1
    return {
        "dig": -np.logaddexp(0, -noise) / 16,
        "strong": -np.logaddexp(0, -4 * noise),
        "reset_60": np.where(is_reset, -60.0, -1e-4),
        "reset_1e4": np.where(is_reset, -1e4, -1e-4),
        "none": np.zeros(shape),
    }[kind]


def inputs(seed, b=2, t=20, h=1, k=16, v=16, gate="dig", dtype=jnp.float32, gate_dtype=jnp.float32):
    """Return random (q, k, v, g, initial_state) and the cotangents of (o, final_state)."""
    rng = np.random.default_rng(seed)
    queries, keys, values, do = (jnp.asarray(rng.standard_normal((b, t, h, n)), dtype) for n in (k, k, v, v))
    g = jnp.asarray(gates(gate, rng, (b, t, h, k)), gate_dtype)
    state, d_state = (jnp.asarray(rng.standard_normal((b, h, k, v)), jnp.float32) for _ in range(2))
    return (queries, keys, values, g, state), (do, d_state)


def recurrence(arrays, cotangents=None, *, scale=None, segment_ids=None, reverse=False):
    """Run S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t.

    Returns:
        o, final_state and, given cotangents, the gradients of q, k, v, g and initial_state, by name.
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


def scan_order(grid, direction):
    """Raster indices of the tokens of a grid, in the order in which a direction visits them."""
    index = np.arange(grid[0] * grid[1]).reshape(grid)
    index = (index.T if direction.startswith("column") else index).ravel()
    return index[::-1] if direction.endswith("reversed") else index


def recurrence_2d(arrays, cotangents=None, *, grid, direction, segment_ids=None, scale=None):
    """`recurrence` over the tokens of a grid, which stay in raster order."""
    order = scan_order(grid, direction)
    back = np.argsort(order)
    *tokens, state = (np.asarray(x, np.float64) for x in arrays)
    if cotangents is not None:
        d_o, d_state = cotangents
        cotangents = np.asarray(d_o, np.float64)[:, order], d_state
    if segment_ids is not None:
        segment_ids = np.asarray(segment_ids)[:, order]
    tokens = (x[:, order] for x in tokens)
    results = recurrence((*tokens, state), cotangents, segment_ids=segment_ids, scale=scale)
    return {name: x if name.endswith("state") else x[:, back] for name, x in results.items()}


def gated_recurrence(arrays, gates, cotangents=None, *, normalizer, eps, **options):
    """Results of `gated_gla_2d` and, given cotangents, its gradients, by name (`GATED_NAMES`).

    Args:
        arrays: (q, k, v, gate_logits, initial_state).
        gates: (out_gate, norm_weight); norm_weight is [V] or [B, V].
        cotangents: of the output and of the final state.
        normalizer, eps: `gate_normalizer` and `eps` of `gated_gla_2d`.
        options: `grid`, `direction`, `segment_ids` and `scale` of `recurrence_2d`.
    """
    q, k, v, logits, state = (np.asarray(x, np.float64) for x in arrays)
    out_gate, weight = (np.asarray(x, np.float64) for x in gates)
    sum_axes = tuple(range(weight.ndim - 1, 3))
    weight = np.expand_dims(weight, (-3, -2))
    arrays = (q, k, v, -np.logaddexp(0, -logits) / normalizer, state)
    results = recurrence_2d(arrays, **options)
    inverse_rms = (np.mean(results["o"] ** 2, axis=-1, keepdims=True) + eps) ** -0.5
    normed, sigmoid = results["o"] * inverse_rms, 1 / (1 + np.exp(-out_gate))
    results["o"] = normed * weight * out_gate * sigmoid
    if cotangents is None:
        return results
    d_out, d_state = (np.asarray(x, np.float64) for x in cotangents)
    d_normed = d_out * weight * out_gate * sigmoid
    d_o = inverse_rms * (d_normed - normed * np.mean(d_normed * normed, axis=-1, keepdims=True))
    gradients = recurrence_2d(arrays, (d_o, d_state), **options) | results
    gradients["dg"] = gradients["dg"] / (1 + np.exp(logits)) / normalizer
    gradients["dout_gate"] = d_out * normed * weight * sigmoid * (1 + out_gate * (1 - sigmoid))
    gradients["dnorm_weight"] = np.sum(d_out * normed * out_gate * sigmoid, sum_axes)
    return gradients


def tangents(function, arrays, dots, step=1e-6):
    """Return the tangents of `function(*arrays)` by central differences; accurate to about 1e-9.

    `function` returns a dictionary of arrays; `dots` holds the arrays' tangents, None for zero.
    """
    ends = []
    for sign in (1, -1):
        pairs = zip(arrays, dots, strict=True)
        moved = (np.float64(x) + (0 if dot is None else sign * step * np.float64(dot)) for x, dot in pairs)
        ends.append(function(*moved))
    return {name: (ends[0][name] - ends[1][name]) / (2 * step) for name in ends[0]}


def term_sizes(arrays, cotangents, **options):
    """Results of `recurrence` for absolute values: the sums of the absolute values of all terms, by name."""
    q, k, v, g, state = arrays
    magnitudes = (*map(np.abs, (q, k, v)), g, np.abs(state))
    return recurrence(magnitudes, tuple(map(np.abs, cotangents)), **options)


def relative_error(actual, expected, terms=None, token_axis=1):
    """Return the largest relative RMS error of an array and, given `terms`, of its channels and tokens.

    The error of a channel over all tokens is relative to the RMS of the channel. The error of a token over
    all channels is relative to the RMS of its terms (`term_sizes`), because a token itself may cancel: o may
    be (q . k) v with q . k close to zero. Only terms of the exact result count. If an implementation adds and
    subtracts others, such as those of large neighboring tokens, their rounding errors do not pass.
    """

    def relative(size, axis):
        error, size = (np.sqrt(np.mean(np.square(x), axis=axis)) for x in (actual - expected, size))
        return np.max(np.divide(error, size, out=np.where(error > 0, np.inf, 0.0), where=size > 0))

    errors = [relative(expected, None)]
    if terms is not None:
        errors += [relative(expected, token_axis), relative(terms, 3)]
    return max(errors)


def assert_close(actual, expected, tolerance, names=NAMES, terms=None):
    """Check the `relative_error` of every array; an array that should be zero must be exactly zero."""
    terms = [None] * len(names) if terms is None else terms
    for name, a, e, t in zip(names, actual, expected, terms, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape, name
        error = relative_error(a, e, t, token_axis=2 if name.endswith("state") else 1)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"
