"""Paths from data to noise, and the conversion between the predictions of a denoiser.

[S] is Ma et al. 2024 (SiT), [V] is Salimans & Ho 2022 (Progressive Distillation). Time runs from t = 0, data,
to t = 1, noise. SiT's code runs the other way: replace its t by 1 - t and change the sign of its velocity.

A path mixes an image x with standard normal noise ε and moves with a velocity v                  [S 1, 2]:

    x_t = α x + σ ε,   v = dx_t/dt = α̇ x + σ̇ ε

    linear          α = 1 - t                σ = t               α̇ = -1               σ̇ = 1
    trigonometric   α = cos(π/2 t)           σ = sin(π/2 t)      α̇ = -π/2 σ           σ̇ = π/2 α
    vp              α = exp(-t²Δ/4 - tβ₀/2)  σ = √(1 - α²)       α̇ = -(tΔ + β₀) α/2   σ̇ = -α α̇ / σ

The last one is the variance-preserving diffusion with the noise rate β(t) = β₀ + tΔ, β₀ = 0.1, Δ = 19.9,
because d log α/dt = -β/2 and α² + σ² = 1. DDPM's linear betas are β_i = β(i/999)/1000, so that DDPM's tables
are this path at t = (i + 1)/1000, up to the difference between a product of 1 - β_i and an exponential.

Conversions. x_t and any one of these determine the others:

    noise ε,   x,   velocity v = α̇ x + σ̇ ε,   score s = ∇ log p(x_t) = -ε / σ,   v = α ε - σ x [V], here "v"

The first equation and one more are a linear system for x and ε. With ω = α σ̇ - α̇ σ > 0,

    from v (velocity):   x = (σ̇ x_t - σ v) / ω,   ε = (α v - α̇ x_t) / ω
    from [V]'s v:        x = (α x_t - σ v) / (α² + σ²),   ε = (σ x_t + α v) / (α² + σ²)

On the trigonometric path the velocity is π/2 times [V]'s v. The noise does not determine x where α = 0, and x
does not determine the noise where σ = 0. The velocity of the vp path is infinite at t = 0.
"""

import dataclasses
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dig_jax.errors import suggest

PATHS = ("linear", "trigonometric", "vp")
PREDICTIONS = ("velocity", "x", "noise", "v", "score")

Values = Float[Array | np.ndarray, "*t"] | float
"""An array of NumPy or JAX; functions of it return an array of the same kind and dtype."""

_BETA_0, _BETA_1 = 0.1, 20.0


class Level(NamedTuple):
    """The coefficients of a path at some times, and their derivatives by time."""

    alpha: Any
    sigma: Any
    alpha_dot: Any
    sigma_dot: Any

    @property
    def omega(self) -> Any:
        """ω = α σ̇ - α̇ σ, the determinant of (x, ε) -> (x_t, v)."""
        return self.alpha * self.sigma_dot - self.alpha_dot * self.sigma

    @property
    def snr(self) -> Any:
        """Signal-to-noise ratio α²/σ²."""
        return (self.alpha / self.sigma) ** 2


@dataclasses.dataclass(frozen=True)
class Path:
    """α(t) and σ(t) for t in [0, 1], from data to noise.

    Its methods take arrays of NumPy, which keep float64, or of JAX.

    Attributes:
        name: one of PATHS.
        noise_scale: factor of σ, s in x_t = α x + σ s ε. JiT takes resolution/256, because noise of a given
            deviation hides less of a larger image.

    Raises:
        ValueError: unknown name, or a noise scale that is not positive.
    """

    name: str = "linear"
    noise_scale: float = 1.0

    def __post_init__(self):
        if self.name not in PATHS:
            raise ValueError(
                f"unknown path: got {self.name!r}; expected one of {', '.join(PATHS)}"
                f"{suggest(self.name, PATHS)}"
            )
        if not self.noise_scale > 0:
            raise ValueError(f"invalid noise_scale: got {self.noise_scale}; expected a positive number")

    @property
    def first_time(self) -> float:
        """The least time at which the velocity is finite; SiT trains the vp path from here."""
        return 1e-5 if self.name == "vp" else 0.0

    def at(self, t: Values) -> Level:
        """Return the coefficients at times t, in the dtype of t."""
        level = self._unscaled(t)
        if self.noise_scale == 1:
            return level
        return level._replace(
            sigma=self.noise_scale * level.sigma, sigma_dot=self.noise_scale * level.sigma_dot
        )

    def _unscaled(self, t: Values) -> Level:
        xp = _namespace(t)
        if self.name == "linear":
            one = xp.ones_like(t)
            return Level(1 - t, t, -one, one)
        if self.name == "trigonometric":
            alpha, sigma = xp.cos(np.pi / 2 * t), xp.sin(np.pi / 2 * t)
            return Level(alpha, sigma, -np.pi / 2 * sigma, np.pi / 2 * alpha)
        delta = _BETA_1 - _BETA_0
        log_alpha = -0.25 * t**2 * delta - 0.5 * t * _BETA_0
        alpha, sigma = xp.exp(log_alpha), xp.sqrt(-xp.expm1(2 * log_alpha))
        alpha_dot = -0.5 * (t * delta + _BETA_0) * alpha
        with np.errstate(divide="ignore"):
            return Level(alpha, sigma, alpha_dot, -alpha * alpha_dot / sigma)

    def time_of(self, ratio: Values) -> Any:
        """Return the time at which σ/α has this value: the inverse of the noise-to-signal ratio."""
        xp = _namespace(ratio)
        ratio = ratio / self.noise_scale
        if self.name == "linear":
            return ratio / (1 + ratio)
        if self.name == "trigonometric":
            return xp.arctan(ratio) * 2 / np.pi
        # σ/α = r means α^-2 = 1 + r²: a quadratic equation in t.
        target = 2 * xp.log1p(ratio**2)
        return target / (_BETA_0 + xp.sqrt(_BETA_0**2 + (_BETA_1 - _BETA_0) * target))


def convert(prediction: Values, source: str, target: str, x_t: Values, level: Level) -> Any:
    """Return what a prediction of one kind says about another.

    Args:
        prediction: what the denoiser returned.
        source: its kind, one of PREDICTIONS.
        target: the kind to return.
        x_t: the noisy images.
        level: coefficients at the images' times, of a shape that broadcasts.
    """
    if source == target:
        return prediction
    alpha, sigma, alpha_dot, sigma_dot = level
    # Only the side that is needed is computed: the other one may be singular there.
    if target == "x":
        return {
            "velocity": lambda p: (sigma_dot * x_t - sigma * p) / level.omega,
            "noise": lambda p: (x_t - sigma * p) / alpha,
            "v": lambda p: (alpha * x_t - sigma * p) / (alpha**2 + sigma**2),
            "score": lambda p: (x_t + sigma**2 * p) / alpha,
        }[source](prediction)
    if target == "noise":
        return {
            "velocity": lambda p: (alpha * p - alpha_dot * x_t) / level.omega,
            "x": lambda p: (x_t - alpha * p) / sigma,
            "v": lambda p: (sigma * x_t + alpha * p) / (alpha**2 + sigma**2),
            "score": lambda p: -sigma * p,
        }[source](prediction)
    x, noise = (convert(prediction, source, kind, x_t, level) for kind in ("x", "noise"))
    return combine(x, noise, target, level)


def combine(x: Values, noise: Values, target: str, level: Level) -> Any:
    """Return the quantity of this kind, one of PREDICTIONS, for images and their noise."""
    return {
        "x": lambda: x,
        "noise": lambda: noise,
        "velocity": lambda: level.alpha_dot * x + level.sigma_dot * noise,
        "v": lambda: level.alpha * noise - level.sigma * x,
        "score": lambda: -noise / level.sigma,
    }[target]()


def _namespace(array: Values) -> types.ModuleType:
    return jnp if isinstance(array, jax.Array) else np
