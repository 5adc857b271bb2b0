"""Distributions of the training time.

[E] is Esser et al. 2024 (Stable Diffusion 3). Time runs from 0, data, to 1, noise. A distribution is its
quantile function Q: the time of an image is Q(u) with u uniform in [0, 1), and evenly spread u give the times
of the held-out loss. Three steps make Q:

    1. Base. uniform: q(u) = u. logit_normal: logit(t) ~ N(mean, std²), so that
       q(u) = 1/(1 + exp(-mean - std·Φ⁻¹(u))) [E 19]. REPA's lognormal σ with t = σ/(1 + σ) is
       logit_normal(0, 1); JiT's (-0.8, 0.8), in a time that runs from noise to data, is (0.8, 0.8) here.
    2. Truncation to [low, high]. With the base's distribution function F = q⁻¹, conditioning on the interval
       maps u to q(F(low) + u (F(high) - F(low))).
    3. Shift by s > 0: t ↦ s t / (1 + (s - 1) t) [E 23]. It multiplies σ/α = t/(1 - t) of the linear path
       by s, so that shifts compose by multiplication; 0 and 1 stay. Larger images need more noise to lose the
       same information: RAE (Zheng et al. 2025) takes s = √(dimensions/4096).
"""

import dataclasses
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dig_jax.diffusion.path import Values
from dig_jax.errors import suggest

DISTRIBUTIONS = ("uniform", "logit_normal")


@dataclasses.dataclass(frozen=True)
class Times:
    """A distribution of times in [0, 1].

    Attributes:
        distribution: "uniform" or "logit_normal".
        mean: of the logit; logit_normal only.
        std: of the logit; logit_normal only.
        low: least time before the shift.
        high: greatest time before the shift.
        shift: factor s of the shift toward noise; 1 is none.

    Raises:
        ValueError: an invalid value, by name.
    """

    distribution: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(
                f"unknown times: got {self.distribution!r}; expected one of {', '.join(DISTRIBUTIONS)}"
                f"{suggest(self.distribution, DISTRIBUTIONS)}"
            )
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"invalid time_low, time_high: got {self.low}, {self.high}; expected 0 ≤ time_low < time_high"
                " ≤ 1"
            )
        for name in ("std", "shift"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"invalid time_{name}: got {getattr(self, name)}; expected a positive number"
                )

    def sample(self, keys: Key[Array, " b"]) -> Float[Array, " b"]:
        """Draw one time for each of `keys`."""
        return self.quantile(jax.vmap(lambda key: jax.random.uniform(key))(keys))

    def quantile(self, u: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """Return the time below which a fraction u in [0, 1] of the times lie."""
        if self.distribution == "uniform":
            t = self.low + u * (self.high - self.low)
        else:
            first, last = self._fraction(self.low), self._fraction(self.high)
            logit = self.mean + self.std * jax.scipy.special.ndtri(first + u * (last - first))
            t = jnp.clip(jax.nn.sigmoid(logit), self.low, self.high)  # rounding
        return shifted(t, self.shift)

    def _fraction(self, t: float) -> float:
        """Return the probability of times below t, without truncation and shift."""
        if t in (0, 1):
            return float(t)
        return statistics.NormalDist(self.mean, self.std).cdf(math.log(t / (1 - t)))


def shifted(t: Values, shift: float) -> Any:
    """Return the times moved toward noise by this factor of t/(1 - t)."""
    return shift * t / (1 + (shift - 1) * t)
