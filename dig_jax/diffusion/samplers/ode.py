"""Solvers of the probability flow dx/dt = v(x, t): Euler, Heun, DPM-Solver++(2M) and UniPC.

[D] is Lu et al. 2022 (DPM-Solver++), [U] Zhao et al. 2023 (UniPC), [K] Karras et al. 2022 (EDM).

Euler    x' = x + h v(x, t), h = t' - t.
Heun     predicts x' so, evaluates v' = v(x', t') there, and corrects x' = x + h/2 (v + v') [K, algorithm 1].
         The last step only predicts: N steps take 2N - 1 evaluations.

Exponential integrators. With λ = log(α/σ), dx/dλ = (σ̇/σ)/λ̇ · x - (ω/σ)/λ̇ · D and λ̇ = -ω/(ασ) give
d(x/σ)/dλ = e^λ D, whose integral over a step with h = λ' - λ is                                       [D 9]

    x' = (σ'/σ) x + σ' ∫ e^s D(s) ds       (∫ from λ to λ')

For a constant D the integral is α'(1 - e^{-h}) D: DDIM. DPM++2M extrapolates D to the middle of the step from
the step before, with r = h_before/h                                                                [D 14, 18]

    x' = (σ'/σ) x + α'(1 - e^{-h}) [D + (D - D_before)/(2r)]

UniPC-2 takes this as its predictor. At the predicted point it evaluates D', which is also the model value of
the next step, so that N steps take N evaluations, and then corrects the point       [U, algorithm 1, B2(h)]:

    x' = (σ'/σ) x + α'(1 - e^{-h}) [D + ρ₁ (D_before - D)/r₁ + ρ₂ (D' - D)],   r₁ = -r
    ρ₁ + ρ₂ = b₁,   r₁ ρ₁ + ρ₂ = b₂

The b are the exact integrals of the first two powers of (s - λ)/h, divided by that of 1: with
φ₁ = (e^{-h} - 1)/(-h), φ₂ = (φ₁ - 1)/(-h), φ₃ = (φ₂ - 1/2)/(-h) they are b₁ = φ₂/φ₁ and b₂ = 2 φ₃/φ₁. D is
integrated exactly if it is a quadratic in λ, which gives order 3. The first step has no D_before, and uses
ρ₂ = 1/2. Where x starts at α = 0, h is infinite; all formulas keep finite limits, which are used.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float64

from dig_jax.diffusion.path import Level
from dig_jax.diffusion.process import Process
from dig_jax.diffusion.samplers.linear import LinearSampler, Table, velocity_row

Steps = Float64[np.ndarray, " steps"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(LinearSampler):
    """Euler's method on the velocity. Order 1, `steps` evaluations."""

    def table(self, process: Process) -> Table:
        """Return one row per step."""
        times, level = process.knots(self.steps)
        weights = np.zeros((len(times) - 1, 1, 3))
        for i in range(len(weights)):
            weights[i, 0, :2] = _euler(level, i, float(times[i + 1] - times[i]))
        return Table(times[:-1], weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(LinearSampler):
    """Heun's method on the velocity. Order 2, 2 · steps - 1 evaluations."""

    evaluations_per_step: ClassVar[int] = 2

    def table(self, process: Process) -> Table:
        """Return a predicting and a correcting row per step; the last step only predicts."""
        times, level = process.knots(self.steps)
        steps = len(times) - 1
        weights = np.zeros((2 * steps, 2, 4))  # state: x, and x + h/2 v of the step's start
        for i in range(steps):
            h = float(times[i + 1] - times[i])
            weights[2 * i, 0, [0, 2]] = _euler(level, i, h)
            if level.sigma[i + 1] > 0:
                weights[2 * i, 1, [0, 2]] = _euler(level, i, h / 2)
                weights[2 * i + 1, 0, [0, 2]] = velocity_row(level, i + 1) * h / 2
                weights[2 * i + 1, 0, 1] = 1
        every = np.repeat(times, 2)[1:-1]
        evaluated = 2 * steps - (level.sigma[-1] == 0)
        return Table(every[:evaluated], weights[:evaluated], per_step=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp2M(LinearSampler):
    """DPM-Solver++(2M), midpoint form. Order 2, `steps` evaluations."""

    def table(self, process: Process) -> Table:
        """Return one row per step; the state keeps the D of the step before."""
        times, level = process.knots(self.steps)
        h, inverse_r = log_snr_steps(level)
        weights = np.zeros((len(h), 2, 4))
        weights[:, 1, 2] = 1
        for i in range(len(h)):
            weights[i, 0, [0, 2]] = _flow(level, i)
            slope = level.alpha[i + 1] * -np.expm1(-h[i]) * inverse_r[i] / 2
            weights[i, 0, [2, 1]] += [slope, -slope]
        return Table(times[:-1], weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniPC(LinearSampler):
    """UniPC-2 with B2(h) and its corrector. Order 3, `steps` evaluations."""

    def table(self, process: Process) -> Table:
        """Return one row per step: correct the point where D was evaluated, and predict the next one.

        The state holds the predicted x, and of the step before: its corrected x, its D and the D before that.
        """
        times, level = process.knots(self.steps)
        h, inverse_r = log_snr_steps(level)
        weights = np.zeros((len(h), 4, 6))
        for i in range(len(h)):
            corrected = np.zeros(6)
            if i == 0:
                corrected[0] = 1
            else:
                corrected[[1, 2]] = _flow(level, i - 1)
                first, last = _corrector(h[i - 1], inverse_r[i - 1])
                gain = level.alpha[i] * -np.expm1(-h[i - 1])
                corrected[[2, 3, 4]] += gain * np.array([-first - last, first, last])
            from_x, from_image = _flow(level, i)
            slope = level.alpha[i + 1] * -np.expm1(-h[i]) * inverse_r[i] / 2
            weights[i, 0] = from_x * corrected
            weights[i, 0, [4, 2]] += [from_image + slope, -slope]
            weights[i, 1] = corrected
            weights[i, 2, 4] = weights[i, 3, 2] = 1
        return Table(times[:-1], weights)


def _euler(level: Level, i: int, h: float) -> Float64[np.ndarray, " 2"]:
    """Return the coefficients of x and D in x + h v, or in the last step's x' = D."""
    if level.sigma[i + 1] == 0:
        return np.array([0.0, 1.0])
    return np.array([1.0, 0.0]) + h * velocity_row(level, i)


def _flow(level: Level, i: int) -> Float64[np.ndarray, " 2"]:
    """Return the coefficients of x and D in the exact flow of a constant D from knot i to the next."""
    scale = level.sigma[i + 1] / level.sigma[i]
    return np.array([scale, level.alpha[i + 1] - scale * level.alpha[i]])


def log_snr_steps(level: Level) -> tuple[Steps, Steps]:
    """Return h and h/h_before of each step in λ = log(α/σ); the ratio is 0 where the step has order 1."""
    with np.errstate(divide="ignore"):
        lam = np.log(level.alpha) - np.log(level.sigma)
    h = np.diff(lam)
    ratio = np.zeros_like(h)
    ratio[1:] = np.where(np.isinf(h[1:]), 0, h[1:]) / h[:-1]
    return h, ratio


def _corrector(h: float, inverse_r: float) -> tuple[float, float]:
    """Return ρ₁/r₁, the factor of D_before - D, and ρ₂."""
    if inverse_r == 0:  # there is no D_before at a finite distance
        return 0.0, 0.5
    phi_1 = np.expm1(-h) / -h
    phi_2 = (phi_1 - 1) / -h
    phi_3 = (phi_2 - 0.5) / -h
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    r_1 = -1 / inverse_r
    rho_1 = (b_1 - b_2) / (1 - r_1)
    return rho_1 / r_1, b_1 - rho_1
