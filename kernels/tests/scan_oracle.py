"""The selective scan and its gradients in NumPy and float64, token by token, and random inputs."""

from typing import Any

import numpy as np

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "initial_state")


def inputs(
    batch: int, tokens: int, channels: int, states: int = 16, step: float = 0.05, seed: int = 0
) -> dict[str, Any]:
    """Return random arguments in float32, with step sizes of about `step` and the decay rates of Mamba."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    wide, narrow = (batch, tokens, channels), (batch, tokens, states)
    rates = -np.arange(1, states + 1) * np.exp(0.1 * normal(channels, states))
    return {
        "x": normal(*wide),
        "dt": (step * np.exp(normal(*wide))).astype(np.float32),
        "A": rates.astype(np.float32),
        "B": normal(*narrow),
        "C": normal(*narrow),
        "D": normal(channels),
        "z": normal(*wide),
        "initial_state": normal(batch, channels, states),
    }


def _order(tokens: int, reverse: bool) -> range:
    return range(tokens - 1, -1, -1) if reverse else range(tokens)


def _states(x, dt, A, B, state, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the states before and after each token, [T, B, channels, N]."""
    before, after = (np.empty((x.shape[1], *state.shape)) for _ in range(2))
    for t in _order(x.shape[1], reverse):
        before[t] = state
        state = np.exp(dt[:, t, :, None] * A) * state + (dt * x)[:, t, :, None] * B[:, t, None]
        after[t] = state
    return before, after


def run(x, dt, A, B, C, D, z, initial_state, *, reverse: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the output and the final state."""
    x, dt, A, B, C, D, z, state = (
        np.asarray(array, np.float64) for array in (x, dt, A, B, C, D, z, initial_state)
    )
    after = _states(x, dt, A, B, state, reverse)[1]
    y = np.einsum("tbdn,btn->btd", after, C) + D * x
    return y * z / (1 + np.exp(-z)), after[0 if reverse else -1]


def gradients(
    x, dt, A, B, C, D, z, initial_state, *, d_y, d_final_state, reverse: bool = False
) -> dict[str, np.ndarray]:
    """Return the gradients of sum(y * d_y) + sum(final_state * d_final_state) by argument."""
    x, dt, A, B, C, D, z, state, d_y, d_state = (
        np.asarray(array, np.float64) for array in (x, dt, A, B, C, D, z, initial_state, d_y, d_final_state)
    )
    before, after = _states(x, dt, A, B, state, reverse)
    sigmoid = 1 / (1 + np.exp(-z))
    y = np.einsum("tbdn,btn->btd", after, C) + D * x
    d_z = d_y * y * sigmoid * (1 + z * (1 - sigmoid))
    d_y = d_y * z * sigmoid
    d_x, d_dt, d_A, d_B = D * d_y, np.zeros_like(dt), np.zeros_like(A), np.zeros_like(B)
    d_C = np.einsum("btd,tbdn->btn", d_y, after)
    for t in reversed(_order(x.shape[1], reverse)):
        d_state = d_state + d_y[:, t, :, None] * C[:, t, None]
        decay = np.exp(dt[:, t, :, None] * A)
        d_exponent = d_state * before[t] * decay
        d_A += np.einsum("bdn,bd->dn", d_exponent, dt[:, t])
        d_input = np.einsum("bdn,bn->bd", d_state, B[:, t])
        d_B[:, t] = np.einsum("bdn,bd->bn", d_state, (dt * x)[:, t])
        d_dt[:, t] = np.einsum("bdn,dn->bd", d_exponent, A) + d_input * x[:, t]
        d_x[:, t] += d_input * dt[:, t]
        d_state = d_state * decay
    values = (d_x, d_dt, d_A, d_B, d_C, np.einsum("btd,btd->d", d_y, x), d_z, d_state)
    return dict(zip(NAMES, values, strict=True))
