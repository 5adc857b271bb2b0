"""Discrete-time Gaussian diffusion: the forward process, its posterior, the losses and respacing.

[D] is Ho et al. 2020 (Denoising Diffusion Probabilistic Models), [I] is Nichol & Dhariwal 2021 (Improved
DDPM). As in the code of both papers, steps count from 0: t here is t + 1 in the papers, and ᾱ_{-1} = 1.

Forward process. With noise levels β_t, α_t = 1 - β_t and ᾱ_t = α_0 ⋯ α_t,

    q(x_t | x_{t-1}) = N(√α_t x_{t-1}, β_t)                                             [D 2]
    q(x_t | x_0)     = N(√ᾱ_t x_0, 1 - ᾱ_t),   x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε            [D 4]

Posterior. Bayes' rule gives q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t) with                            [D 6]

    μ̃_t = √ᾱ_{t-1} β_t / (1 - ᾱ_t) x_0 + √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t) x_t            [D 7]
    β̃_t = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) β_t                                                 [D 7]

Model. The denoiser predicts ε, which determines x_0 and the mean of p(x_{t-1} | x_t) = N(μ, Σ). The second
half of its output, v in [-1, 1], interpolates between the bounds of the variance in the log domain:

    x̂_0 = (x_t - √(1 - ᾱ_t) ε̂) / √ᾱ_t,   μ = μ̃_t(x_t, x̂_0)                              [D 15]
    log Σ = w log β_t + (1 - w) log β̃_t,   w = (v + 1) / 2                               [I 15]

Losses. L_simple = mean (ε - ε̂)² [D 14] trains the mean. The terms of the variational bound [D 5],

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)) for t > 0,   L_0 = -log p(x_0 | x_1) at t = 0,

train the variance in the hybrid loss L_simple + λ L_vb, in which L_vb has no gradient to ε̂       [I 16].
p(x_0 | x_1) is a Gaussian integrated over bins of width 2/255, which suits 8-bit pixels in [-1, 1] [D 13];
for latents L_0 is a training signal but not a likelihood. min-SNR (Hang et al. 2023) weights L_simple by
min(SNR, 5)/SNR, SNR = ᾱ_t/(1 - ᾱ_t), which is min(SNR, 5) times the squared error of x_0.

Respacing to a subsequence S of the timesteps keeps ᾱ on S and recomputes β from it:

    β_i = 1 - ᾱ_{S_i} / ᾱ_{S_{i-1}}                                                      [I 19]

All tables are computed in float64 with NumPy and rounded once, to the dtype of x, when they are read.
"""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dig_jax.diffusion.likelihood import discretized_gaussian_log_likelihood, normal_kl
from dig_jax.diffusion.path import Level
from dig_jax.diffusion.process import Images, Knots, PerImage
from dig_jax.diffusion.schedules import SCHEDULES, Table, space_timesteps
from dig_jax.errors import suggest

Steps = Int[Array, " b"]
Broadcast = Float[Array, "b 1 1 1"]

_LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")
_FIXED_VARIANCES = ("small", "large")
_WEIGHTS = ("none", "min_snr")
_GAMMA = 5.0  # min-SNR's γ


class Prediction(NamedTuple):
    """p(x_{t-1} | x_t) = N(mean, exp(log_variance)) and the denoiser's estimates of x_0 and the noise."""

    mean: Images
    log_variance: Images
    x0: Images
    epsilon: Images


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """A `Process` of `length` discrete steps.

    A time t is an index [B] in 0 … length-1; an index out of range gives NaN instead of the nearest step.

    Attributes:
        schedule: "linear" (β from 1e-4 to 0.02 at 1000 steps, scaled by 1000/num_steps [D §4]) or "cosine"
            (ᾱ follows a squared cosine, β at most 0.999 [I 17]).
        num_steps: number of steps of the original process.
        learn_sigma: whether the denoiser returns a second half that interpolates the variance [I 15].
        loss_type: "mse": MSE of the noise, plus, with a learned variance, the bound's term L_{t-1} in bits
            per dimension, without a gradient to the mean. "rescaled_mse": the same with L_{t-1} ×
            length/1000, which weights the full bound by λ = 0.001 [I 16] for any length. "kl": L_{t-1}
            alone, which trains mean and variance. "rescaled_kl": L_{t-1} × length, whose average over t is
            the full bound.
        fixed_variance: the variance without learn_sigma: "small" (β̃_t) or "large" (β_t) [D §3.2].
        timesteps: increasing original timesteps that a respaced process keeps; None keeps all.
        weight: "none" or "min_snr": the weight of the MSE by timestep, with loss_type "mse" or
            "rescaled_mse".

    Raises:
        ValueError: a field is invalid; the message names it.
    """

    schedule: str = "linear"
    num_steps: int = 1000
    learn_sigma: bool = True
    loss_type: str = "mse"
    fixed_variance: str = "large"
    timesteps: tuple[int, ...] | None = None
    weight: str = "none"

    def __post_init__(self):
        choices = {"schedule": SCHEDULES, "loss_type": _LOSS_TYPES, "fixed_variance": _FIXED_VARIANCES}
        choices["weight"] = _WEIGHTS if self.loss_type in ("mse", "rescaled_mse") else ("none",)
        for field, accepted in choices.items():
            if (value := getattr(self, field)) not in accepted:
                hint = suggest(value, accepted)
                raise ValueError(
                    f"invalid {field}: got {value!r}; expected one of {', '.join(accepted)}{hint}"
                )
        # With fewer steps the linear schedule would need a β of 1 or more.
        least = 21 if self.schedule == "linear" else 2
        if self.num_steps < least:
            raise ValueError(
                f"num_steps too small: got {self.num_steps}; expected at least {least} for schedule"
                f" {self.schedule!r}"
            )
        kept = self.timestep_map
        if len(kept) < 2 or kept[0] < 0 or kept[-1] >= self.num_steps or (np.diff(kept) <= 0).any():
            raise ValueError(
                f"invalid timesteps: got {kept.tolist()}; expected at least 2 increasing integers in"
                f" 0 … {self.num_steps - 1}"
            )

    @property
    def length(self) -> int:
        """Number of steps of this process: num_steps unless it is respaced."""
        return len(self.timestep_map)

    @property
    def noise_scale(self) -> float:
        """1: x_T is standard normal noise."""
        return 1.0

    @cached_property
    def timestep_map(self) -> Int[np.ndarray, " steps"]:
        """The original timestep of each step."""
        return np.arange(self.num_steps) if self.timesteps is None else np.array(self.timesteps, dtype=int)

    @cached_property
    def alphas_cumprod(self) -> Table:
        """ᾱ_t [D 4]."""
        return np.cumprod(1 - SCHEDULES[self.schedule](self.num_steps))[self.timestep_map]

    @cached_property
    def alphas_cumprod_prev(self) -> Table:
        """ᾱ_{t-1}, with ᾱ_{-1} = 1."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas(self) -> Table:
        """α_t = 1 - β_t [I 19]."""
        return self.alphas_cumprod / self.alphas_cumprod_prev

    @cached_property
    def betas(self) -> Table:
        """β_t [I 19]."""
        return 1 - self.alphas

    @cached_property
    def posterior_variance(self) -> Table:
        """β̃_t [D 7]."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> Table:
        """log β̃_t; the first entry, log 0, is replaced by the second."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coef_x0(self) -> Table:
        """The factor of x_0 in μ̃_t [D 7]."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef_xt(self) -> Table:
        """The factor of x_t in μ̃_t [D 7]."""
        return np.sqrt(self.alphas) * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    def respaced(self, steps: int | str) -> "GaussianDiffusion":
        """Return this process on the steps that `space_timesteps` keeps [I 19]."""
        kept = self.timestep_map[space_timesteps(self.length, steps)]
        return dataclasses.replace(self, timesteps=tuple(kept.tolist()))

    def sample_times(self, keys: Key[Array, " b"]) -> Steps:
        """Draw the step of each image, uniformly."""
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, self.length))(keys)

    def times_at(self, fractions: PerImage) -> Steps:
        """Return the steps at these fractions of the process."""
        return (fractions * self.length).astype(jnp.int32)

    def earlier(self, t: Steps, fractions: PerImage) -> Steps:
        """Return the steps moved toward data by these fractions of the process, rounded to whole steps."""
        return jnp.maximum(t - jnp.round(fractions * self.length).astype(t.dtype), 0)

    def level_index(self, t: Steps, count: int) -> Steps:
        """Return the index of each step's range, out of `count` equal ranges of the steps."""
        return t * count // self.length

    def timestep_input(self, t: Steps) -> Steps:
        """Return the timesteps of the original process, on which the denoiser was trained."""
        return jnp.asarray(self.timestep_map, t.dtype).at[t].get(out_sharding=jax.typeof(t).sharding)

    def fractions(self, times: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return (t + 1)/num_steps for the original timesteps: the time of the continuous path."""
        return (self.timestep_map[times] + 1) / self.num_steps

    def corrupt(self, x0: Images, noise: Images, t: Steps) -> Images:
        """Return a sample of q(x_t | x_0) made from standard normal noise [D 4]."""
        signal, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        return lookup(signal, t, x0) * x0 + lookup(sigma, t, x0) * noise

    def targets(self, x0: Images, noise: Images, t: Steps) -> Images:
        """Return the noise."""
        return noise

    def q_posterior(self, x0: Images, x_t: Images, t: Steps) -> tuple[Images, Broadcast, Broadcast]:
        """Return mean, variance and log variance (finite even at t = 0) of q(x_{t-1} | x_t, x_0) [D 6, 7]."""
        coef_x0, coef_xt = self.posterior_mean_coef_x0, self.posterior_mean_coef_xt
        mean = lookup(coef_x0, t, x0) * x0 + lookup(coef_xt, t, x0) * x_t
        return mean, lookup(self.posterior_variance, t, x0), lookup(self.posterior_log_variance, t, x0)

    def predict_x0(self, x_t: Images, t: Steps, epsilon: Images) -> Images:
        """Return x_0 given x_t and its noise [D 15]."""
        recip, recipm1 = np.sqrt(1 / self.alphas_cumprod), np.sqrt(1 / self.alphas_cumprod - 1)
        return lookup(recip, t, x_t) * x_t - lookup(recipm1, t, x_t) * epsilon

    def predict_epsilon(self, x_t: Images, t: Steps, x0: Images) -> Images:
        """Return the noise given x_t and x_0 [D 4]."""
        signal, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        return (x_t - lookup(signal, t, x_t) * x0) / lookup(sigma, t, x_t)

    def knots(self, steps: int | str | None) -> Knots:
        """Return the steps that `space_timesteps` keeps, or all, as times of this process, then clean images.

        The path is α = √ᾱ, σ = √(1 - ᾱ). Its derivatives by the step follow from log ᾱ, which is smooth, by
        central differences, and from α² + σ² = 1.
        """
        signal = np.append(1.0, np.sqrt(self.alphas_cumprod))  # -1 is clean
        sigma = np.sqrt(1 - signal**2)
        signal_dot = signal * np.gradient(np.log(signal))
        sigma_dot = np.append(np.nan, -signal[1:] * signal_dot[1:] / sigma[1:])
        kept = np.arange(self.length) if steps is None else np.array(space_timesteps(self.length, steps))
        times = np.append(kept[::-1], -1)
        return Knots(times, Level(*(table[times + 1] for table in (signal, sigma, signal_dot, sigma_dot))))

    def predict_image(
        self, output: Float[Array, "b h w d"], x_t: Images, t: Steps, *, clip: bool = False
    ) -> Images:
        """Return x_0 given the denoiser's output, as in `p_mean_variance`."""
        return self.p_mean_variance(output, x_t, t, clip=clip).x0

    def p_mean_variance(
        self, output: Float[Array, "b h w d"], x_t: Images, t: Steps, *, clip: bool = False
    ) -> Prediction:
        """Return the model's p(x_{t-1} | x_t) given the denoiser's output at x_t [D 15, I 15].

        Args:
            output: the denoiser's output for (x_t, timestep_input(t)): d = 2c if learn_sigma else c.
            x_t: noisy images [B, H, W, C].
            t: steps [B].
            clip: limit x_0 to [-1, 1], for pixels; mean and epsilon follow from the clipped x_0.

        Raises:
            ValueError: the output has a wrong number of channels.
        """
        epsilon, log_variance = self._interpret(output, x_t, t)
        x0 = self.predict_x0(x_t, t, epsilon)
        if clip:
            x0 = jnp.clip(x0, -1, 1)
            epsilon = self.predict_epsilon(x_t, t, x0)
        return Prediction(self.q_posterior(x0, x_t, t)[0], log_variance, x0, epsilon)

    def loss(
        self, output: Float[Array, "b h w d"], *, x0: Images, noise: Images, x_t: Images, times: Steps
    ) -> dict[str, PerImage]:
        """Return the training loss of each image and its terms; arguments as in `Process.loss`.

        Returns:
            "loss": as loss_type and weight say [B]. "mse": MSE of the noise [D 14]. "vb": the bound's term
            L_{t-1} in bits per dimension, not rescaled.
        """
        epsilon, v = jnp.split(output, [x0.shape[-1]], axis=-1)
        mse = _mean_per_image((self.targets(x0, noise, times) - epsilon) ** 2)

        bound_only = self.loss_type in ("kl", "rescaled_kl")
        if not bound_only:
            output = jnp.concatenate([jax.lax.stop_gradient(epsilon), v], axis=-1)
        vb = self._bound(self.p_mean_variance(output, x_t, times), x0, x_t, times)

        weighted = mse
        if self.weight == "min_snr":
            snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
            weighted = lookup(np.minimum(1, _GAMMA / snr), times, x0)[:, 0, 0, 0] * mse
        scale = {"rescaled_mse": self.length / 1000, "rescaled_kl": self.length}.get(self.loss_type, 1)
        if bound_only:
            loss = scale * vb
        elif self.learn_sigma:
            loss = weighted + scale * vb
        else:
            loss = weighted
        return {"loss": loss, "mse": mse, "vb": vb}

    def _interpret(self, output: Array, x_t: Images, t: Steps) -> tuple[Images, Images]:
        """Return noise and log variance given the denoiser's output."""
        channels = x_t.shape[-1]
        expected = 2 * channels if self.learn_sigma else channels
        if output.shape != (*x_t.shape[:-1], expected):
            raise ValueError(
                f"invalid shape of the denoiser's output: got {output.shape}; expected"
                f" {(*x_t.shape[:-1], expected)} for learn_sigma={self.learn_sigma}"
            )
        output = output.astype(x_t.dtype)
        if not self.learn_sigma:
            # At t = 0, "large" also uses the second β̃, which gives the data a higher likelihood.
            large = np.log(np.append(self.posterior_variance[1], self.betas[1:]))
            table = self.posterior_log_variance if self.fixed_variance == "small" else large
            return output, jnp.broadcast_to(lookup(table, t, x_t), x_t.shape)
        w = (output[..., channels:] + 1) / 2
        upper, lower = lookup(np.log(self.betas), t, x_t), lookup(self.posterior_log_variance, t, x_t)
        return output[..., :channels], w * upper + (1 - w) * lower

    def _bound(self, prediction: Prediction, x0: Images, x_t: Images, t: Steps) -> PerImage:
        """Return L_{t-1}, or L_0 at t = 0, in bits per dimension [D 5]."""
        mean, _, log_variance = self.q_posterior(x0, x_t, t)
        kl = normal_kl(mean, log_variance, prediction.mean, prediction.log_variance)
        decoder = -discretized_gaussian_log_likelihood(x0, prediction.mean, 0.5 * prediction.log_variance)
        return jnp.where(t == 0, _mean_per_image(decoder), _mean_per_image(kl)) / np.log(2)


def lookup(table: Table, t: Steps, x: Images) -> Broadcast:
    """Return table[t] in the dtype of x, shaped to broadcast over images; NaN where t is out of range."""
    sharding = jax.typeof(t).sharding
    values = jnp.asarray(table, x.dtype).at[t]
    values = values.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=sharding)
    return values[:, None, None, None]


def _mean_per_image(x: Images) -> PerImage:
    return jnp.mean(x, axis=(1, 2, 3))
