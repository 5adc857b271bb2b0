"""Solvers of the reverse SDE: Euler-Maruyama, stochastic DPM-Solver++(2M), and EDM's Heun with churn.

[S] is Ma et al. 2024 (SiT), [D] Lu et al. 2022 (DPM-Solver++), [K] Karras et al. 2022 (EDM).

For every w(t) ≥ 0 the SDE                                                                          [S 8]

    dx = (v - w/2 · s) dt + √w dw̄,   s = -ε̂/σ,

run from t = 1 to 0, has the marginals of the flow dx = v dt: the Fokker-Planck equation of the reversed time
gains ½ w ∇·(∇p - s p) = 0. With h = t' - t < 0, Euler-Maruyama takes

    x' = x + h (v - w/2 · s) + √(w |h|) z

SDE-DPM++2M solves the SDE with w = 2 σ²|λ̇|, for which the noise z of a step has the exact variance of an
Ornstein-Uhlenbeck process. With the D̄ of DPM++2M                                                     [D 15]

    x' = (σ'/σ) e^{-h} x + α'(1 - e^{-2h}) D̄ + σ' √(1 - e^{-2h}) z,   h = λ' - λ

EDM works with y = x/α and τ = σ/α, in which the flow is dy/dτ = (y - D)/τ on every path. It first raises τ to
τ̂ = τ (1 + γ) by fresh noise of variance S_noise² (τ̂² - τ²), then takes a step of Heun [K, algorithm 2].
Here the noise of a step is added at the end of the step before.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from jaxtyping import Float64

from dig_jax.diffusion.flow_matching import as_flow
from dig_jax.diffusion.path import Level
from dig_jax.diffusion.process import Process
from dig_jax.diffusion.samplers.linear import LinearSampler, Table, velocity_row
from dig_jax.diffusion.samplers.ode import log_snr_steps
from dig_jax.errors import suggest

FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing")
LAST_STEPS = ("mean", "tweedie", "euler")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerMaruyama(LinearSampler):
    """Euler-Maruyama on the reverse SDE of a `FlowMatching` process [S], `steps` evaluations.

    Attributes:
        form: w/2 by time, as in SiT's code: "constant" (1), "sbdm" (σω/α, the rate of the forward
            diffusion), "sigma" (σ), "linear" (t), "decreasing" toward data ((1 - cos πt)²/4) or
            "increasing_decreasing" (sin² πt).
        norm: factor of w/2.
        last_step: the last step, without noise, from `last_size` to clean images: "mean" (the drift alone),
            "tweedie" (the predicted image) or "euler" (the velocity alone).
        last_size: time of the last evaluation; the others are evenly spaced from noise to it.
    """

    own_times: ClassVar[bool] = True

    form: str = "sigma"
    norm: float = 1.0
    last_step: str = "mean"
    last_size: float = 0.04

    def __post_init__(self):
        for name, accepted in {"form": FORMS, "last_step": LAST_STEPS}.items():
            if (value := getattr(self, name)) not in accepted:
                raise ValueError(
                    f"invalid {name}: got {value!r}; expected one of {', '.join(accepted)}"
                    f"{suggest(value, accepted)}"
                )
        if not 0 < self.last_size < 1:
            raise ValueError(f"invalid last_size: got {self.last_size}; expected a number between 0 and 1")
        if not self.norm >= 0:
            raise ValueError(f"invalid norm: got {self.norm}; expected zero or a positive number")

    def table(self, process: Process) -> Table:
        """Return one row per step."""
        process = as_flow(process, type(self).__name__)
        steps = len(process.knots(self.steps).times) - 1
        # The forward diffusion's rate, like the image of a noise prediction, is infinite where α = 0.
        first = 0.999 if self.form == "sbdm" else process.last_time
        times, level = process.knots_at(np.append(np.linspace(first, self.last_size, steps), 0.0))
        if steps == 1:
            raise ValueError("invalid steps: got 1; expected at least 2, the last of which adds no noise")
        half_w = self.norm * _half_w(self.form, times, level)
        weights = np.zeros((steps, 1, 3))
        for i in range(steps):
            h, score = times[i + 1] - times[i], np.array([-1.0, level.alpha[i]]) / level.sigma[i] ** 2
            drift = velocity_row(level, i) - half_w[i] * score
            weights[i, 0] = [*(np.array([1.0, 0.0]) + h * drift), np.sqrt(2 * half_w[i] * -h)]
        last = {
            "mean": weights[-1, 0, :2],
            "tweedie": [0.0, 1.0],
            "euler": np.array([1.0, 0.0]) - times[-2] * velocity_row(level, steps - 1),
        }
        weights[-1, 0] = [*last[self.last_step], 0.0]
        return Table(times[:-1], weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMpp2MSDE(LinearSampler):
    """Stochastic DPM-Solver++(2M), midpoint form [D], `steps` evaluations."""

    def table(self, process: Process) -> Table:
        """Return one row per step; the state keeps the D of the step before."""
        times, level = process.knots(self.steps)
        h, inverse_r = log_snr_steps(level)
        weights = np.zeros((len(h), 2, 4))
        weights[:, 1, 2] = 1
        weights[:, 0, 0] = level.sigma[1:] / level.sigma[:-1] * np.exp(-h)
        gain, slope = level.alpha[1:] * -np.expm1(-2 * h), inverse_r / 2
        weights[:, 0, 2], weights[:, 0, 1] = gain * (1 + slope), -gain * slope
        weights[:, 0, 3] = level.sigma[1:] * np.sqrt(-np.expm1(-2 * h))
        return Table(times[:-1], weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDMHeun(LinearSampler):
    """EDM's sampler on a `FlowMatching` process [K, algorithm 2]. Order 2, 2 · steps - 1 evaluations.

    Attributes:
        sigma_min: least τ before clean images [K, table 1].
        sigma_max: greatest τ.
        rho: τ^(1/rho) is evenly spaced.
        s_churn: γ = min(s_churn/steps, √2 - 1) where s_min ≤ τ ≤ s_max; 0 is deterministic.
        s_min: least τ with churn.
        s_max: greatest τ with churn.
        s_noise: deviation of the churn's noise.
    """

    evaluations_per_step: ClassVar[int] = 2
    own_times: ClassVar[bool] = True

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"invalid sigma_min, sigma_max: got {self.sigma_min}, {self.sigma_max}; expected"
                " 0 < sigma_min < sigma_max"
            )
        for name in ("rho", "s_noise"):
            if not getattr(self, name) > 0:
                raise ValueError(f"invalid {name}: got {getattr(self, name)}; expected a positive number")
        if not self.s_churn >= 0:
            raise ValueError(f"invalid s_churn: got {self.s_churn}; expected zero or a positive number")

    def table(self, process: Process) -> Table:
        """Return a predicting and a correcting row per step; the last step only predicts."""
        process = as_flow(process, type(self).__name__)
        steps = len(process.knots(self.steps).times) - 1
        tau = self._levels(steps)
        gamma = np.where((tau >= self.s_min) & (tau <= self.s_max), min(self.s_churn / steps, 2**0.5 - 1), 0)
        raised = tau * (1 + gamma)
        raised[-1] = 0
        churn = self.s_noise * np.sqrt(raised**2 - tau**2)
        alpha, alpha_raised = (
            process.curve.at(process.curve.time_of(level)).alpha for level in (tau, raised)
        )

        weights = np.zeros((2 * steps, 2, 4))  # of x = α y; state: x, and y + h/2 · slope of the step's start
        for i in range(steps):
            h = tau[i + 1] - raised[i]
            slope = np.array([1 / alpha_raised[i], -1]) / raised[i]
            here = np.array([1 / alpha_raised[i], 0.0])
            weights[2 * i, 0, [0, 2]] = alpha[i + 1] * (here + h * slope)
            if i + 1 < steps:
                weights[2 * i, 1, [0, 2]] = here + h / 2 * slope
                scale = alpha_raised[i + 1]
                weights[2 * i + 1, 0, [0, 2]] = scale * h / 2 * np.array([1 / alpha[i + 1], -1]) / tau[i + 1]
                weights[2 * i + 1, 0, [1, 3]] = scale, scale * churn[i + 1]
        times = np.empty(2 * steps)
        times[::2], times[1::2] = process.curve.time_of(raised[:-1]), process.curve.time_of(tau[1:])
        start = alpha_raised[0] * np.hypot(tau[0], churn[0])
        return Table(times[:-1], weights[:-1], float(start) / process.noise_scale, per_step=2)

    def _levels(self, steps: int) -> Float64[np.ndarray, " knots"]:
        """Return τ from sigma_max to sigma_min and 0 [K 5]."""
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return np.append(np.linspace(first, last, steps) ** self.rho, 0.0)


def _half_w(form: str, t: Float64[np.ndarray, " knots"], level: Level) -> Float64[np.ndarray, " knots"]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "constant": np.ones_like(t),
            "sbdm": level.sigma * level.omega / level.alpha,
            "sigma": level.sigma,
            "linear": t,
            "decreasing": (1 - np.cos(np.pi * t)) ** 2 / 4,
            "increasing_decreasing": np.sin(np.pi * t) ** 2,
        }[form]
