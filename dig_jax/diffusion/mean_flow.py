"""MeanFlow: flow matching whose network predicts the average velocity of a step, so that one step is enough.

[M] is Geng et al. 2025 (Mean Flows for One-step Generative Modeling), [I] Geng et al. 2025 (Improved Mean
Flows). Time runs from 0, data, to 1, noise. A step goes from t to r ≤ t and has the length h = t - r.

The flow dz/dt = v(z, t) carries noise to data. Its average velocity over a step is                   [M 3]

    u(z_t, r, t) = 1/h ∫ v(z_s, s) ds       (∫ from r to t along the flow),       z_r = z_t - h u

One step with u from t = 1 to r = 0 gives the image. Multiplying by h and taking d/dt along the flow, with r
fixed, gives an equation without an integral                                                          [M 6]

    u + h du/dt = v,     du/dt = ∂u/∂z · v + ∂u/∂t + ∂u/∂h

The derivative is one product with the Jacobian in forward mode, in the direction (v, 1, 1). Training makes
the left side, V, the velocity of flow matching [I]: E|V - v_x|² with v_x = α̇ x + σ̇ ε has its minimum over
functions of z_t where V is the flow's velocity. The direction v of the derivative is the network's own
velocity û = u(z_t, t, t), which unlike v_x is a function of z_t. No gradient flows through the derivative and
its direction. For h = 0 this is flow matching, and the network's velocity serves every other sampler.

Guidance [I]. The velocity guided with scale w is v_u + w (v_c - v_u), with the velocities v_c of the class
and v_u of the null class. A network that knows w is trained with the target

    v_x + (1 - 1/w) (û_w - û_u)

At the minimum û_w = v_c + (1 - 1/w) (û_w - v_u), which is the guided velocity. So one evaluation of the
network takes a guided step. w is drawn with a density ∝ w^-p on [1, w_max]. It holds at the times of an
interval, whose ends are drawn too; w = 1 outside and for dropped labels.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dig_jax.diffusion.flow_matching import FlowMatching
from dig_jax.diffusion.path import combine, convert
from dig_jax.diffusion.piecewise import TOLERANCE
from dig_jax.diffusion.process import Images, PerImage, Process

_FLOOR = 0.05  # of the divisor σ of x predictions, as in JiT's loss


class Jumps(NamedTuple):
    """A step for each image: its start t, its length h = t - r, and the guidance on it.

    `strength` is 1 - 1/w for the scale w of guidance, from `low` to `high` are the times with guidance.
    """

    times: PerImage
    lengths: PerImage
    strength: PerImage
    low: PerImage
    high: PerImage

    @property
    def inputs(self) -> Float[Array, "b 4"]:
        """What the network takes in addition to t."""
        return jnp.stack([self.lengths, self.strength, self.low, self.high], axis=-1)

    @property
    def here(self) -> "Jumps":
        """Steps of length 0, which give the velocity at t; as in training, their interval is [0, 1]."""
        zeros = jnp.zeros_like(self.lengths)
        return self._replace(lengths=zeros, strength=self.strength_here, low=zeros, high=zeros + 1)

    @property
    def unguided(self) -> "Jumps":
        """Without guidance."""
        zeros = jnp.zeros_like(self.strength)
        return self._replace(strength=zeros, low=zeros, high=zeros + 1)

    @property
    def strength_here(self) -> PerImage:
        """1 - 1/w at the times, 0 outside of the interval."""
        times = self.times
        return self.strength * ((self.low <= times + TOLERANCE) & (times <= self.high + TOLERANCE))


@dataclasses.dataclass(frozen=True)
class MeanFlow(FlowMatching):
    """Flow matching for average velocities.

    Attributes:
        instant_fraction: fraction of the steps of training that have length 0.
        guidance_max: greatest scale of guidance in training, w_max; 1 trains without guidance.
        guidance_power: p in the density w^-p of the scale.
        time_range: the network gets timesteps of 0 to this number. Training takes the derivative by t, and
            the fastest feature of 1000 t, as in flow matching, has a derivative of 1000 (Lu & Song 2024).

    Raises:
        ValueError: a field is invalid; the message names it.
    """

    instant_fraction: float = 0.5
    guidance_max: float = 8.0
    guidance_power: float = 1.0
    time_range: float = 10.0

    def __post_init__(self):
        super().__post_init__()
        if self.curve.name == "vp":
            raise ValueError("unsupported path of meanflow: got 'vp'; expected linear or trigonometric")
        if self.prediction not in ("velocity", "x"):
            raise ValueError(
                f"unsupported prediction of meanflow: got {self.prediction!r}; expected velocity or x"
            )
        if self.weight != "none":
            raise ValueError(f"unsupported weight of meanflow: got {self.weight!r}; expected none")

    def sample_jumps(self, keys: Key[Array, " b"], times: PerImage, drop: Bool[Array, " b"]) -> Jumps:
        """Draw the steps of training, each from two times, of which `times` are the first.

        Args:
            keys: one per image.
            times: drawn by `sample_times`.
            drop: whether the label is dropped, which leaves out guidance.
        """
        second = self.sample_times(_part(keys, 0))
        t, r = jnp.maximum(times, second), jnp.minimum(times, second)
        is_instant = _uniform(keys, 1) < self.instant_fraction
        w = _power_law(_uniform(keys, 2), self.guidance_max, self.guidance_power)
        low, high = 0.5 * _uniform(keys, 3), 0.5 + 0.5 * _uniform(keys, 4)
        # A single time is in the interval or not; [I] trains its guidance everywhere.
        low, high = jnp.where(is_instant, 0.0, low), jnp.where(is_instant, 1.0, high)
        jumps = Jumps(t, jnp.where(is_instant, 0, t - r), 1 - 1 / w, low, high)
        return jax.tree.map(lambda plain, drawn: jnp.where(drop, plain, drawn), jumps.unguided, jumps)

    def timestep_input(self, times: PerImage) -> PerImage:
        """Return the timesteps, from 0 to `time_range`."""
        return self.time_range * times

    def targets(self, x0: Images, noise: Images, times: PerImage) -> Images:
        """Return the velocity, whatever the network predicts."""
        return combine(x0, noise, "velocity", self.level(times, x0))

    def loss(
        self, output: Float[Array, "b h w d"], *, x0: Images, noise: Images, x_t: Images, times: PerImage
    ) -> dict[str, PerImage]:
        """Return the velocity loss for steps of length 0; arguments as in `Process.loss`."""
        velocity = self.average_velocity(output, x_t, times)
        return super().loss(velocity, x0=x0, noise=noise, x_t=x_t, times=times)

    def predict(self, output: Float[Array, "b h w d"], kind: str, x_t: Images, times: PerImage) -> Images:
        """Return the estimate of a quantity given the network's output for steps of length 0."""
        velocity = self.average_velocity(output, x_t, times)
        return convert(velocity, "velocity", kind, x_t, self.level(times, x_t))

    def average_velocity(self, output: Float[Array, "b h w d"], z: Images, times: PerImage) -> Images:
        """Return u for the network's output at z.

        The prediction x stands for (σ̇ z - ω x)/σ, on the linear path (z - x)/t, with a divisor of at least
        0.05 (Lu et al. 2026, pixel MeanFlow). Where the limit applies, the prediction
        is z - 0.05 v, not an image.
        """
        prediction = output[..., : z.shape[-1]].astype(z.dtype)
        if self.prediction == "velocity":
            return prediction
        level = self.level(times, z)
        divisor = jnp.maximum(level.sigma, _FLOOR * self.noise_scale)
        return (level.sigma_dot * z - level.omega * prediction) / divisor


def as_mean_flow(process: Process, sampler: str) -> MeanFlow:
    """Return the process, or raise ValueError that the sampler supports only MeanFlow."""
    if not isinstance(process, MeanFlow):
        raise ValueError(
            f"unsupported process for {sampler}: got {type(process).__name__}; expected MeanFlow, which"
            " config.diffusion.process=meanflow trains"
        )
    return process


def _part(keys: Key[Array, " b"], number: int) -> Key[Array, " b"]:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _uniform(keys: Key[Array, " b"], number: int) -> PerImage:
    return jax.vmap(jax.random.uniform)(_part(keys, number))


def _power_law(u: PerImage, largest: float, power: float) -> PerImage:
    """Return quantiles of the density ∝ w^-power on [1, largest]."""
    if power == 1:
        return jnp.exp(u * math.log(largest))
    exponent = 1 - power
    return (1 + u * (largest**exponent - 1)) ** (1 / exponent)
