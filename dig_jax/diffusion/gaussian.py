"""Discrete-time Gaussian diffusion: the forward process, its posterior, the losses and respacing.

[D] is Ho et al. 2020 (Denoising Diffusion Probabilistic Models), [I] is Nichol & Dhariwal 2021 (Improved
DDPM). Steps are counted from 0 as in the code of both: t here is t + 1 in the papers, ᾱ_{-1} = 1.

Forward process. With noise levels β_t, α_t = 1 - β_t and ᾱ_t = α_0 ⋯ α_t,

    q(x_t | x_{t-1}) = N(√α_t x_{t-1}, β_t)                                             [D 2]
    q(x_t | x_0)     = N(√ᾱ_t x_0, 1 - ᾱ_t),   x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε            [D 4]

Posterior. By Bayes' rule on these two Gaussians, q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t) with      [D 6]

    μ̃_t = √ᾱ_{t-1} β_t / (1 - ᾱ_t) x_0 + √α_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t) x_t            [D 7]
    β̃_t = (1 - ᾱ_{t-1}) / (1 - ᾱ_t) β_t                                                 [D 7]

Model. The denoiser predicts ε, hence x_0, hence the mean of p(x_{t-1} | x_t) = N(μ, Σ); its second half,
v in [-1, 1], interpolates between the lower and the upper bound of the variance in the log domain:

    x̂_0 = (x_t - √(1 - ᾱ_t) ε̂) / √ᾱ_t,   μ = μ̃_t(x_t, x̂_0)                              [D 15]
    log Σ = w log β_t + (1 - w) log β̃_t,   w = (v + 1) / 2                               [I 15]

Losses. L_simple = mean (ε - ε̂)² [D 14] teaches the mean; the terms of the variational bound [D 5],

    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)) for t > 0,   L_0 = -log p(x_0 | x_1) at t = 0,

teach the variance in the hybrid L_simple + λ L_vb, where no gradient reaches ε̂ through L_vb    [I 16].
p(x_0 | x_1) is a Gaussian integrated over bins of width 2/255, as of 8-bit pixels in [-1, 1] [D 13]; of
latents, which are not 8-bit, L_0 is a training signal but no likelihood.

Respacing to a subsequence S of the timesteps keeps ᾱ on S and recomputes β from it:

    β_i = 1 - ᾱ_{S_i} / ᾱ_{S_{i-1}}                                                      [I 19]

Every table is made in float64 with numpy and rounded once, to the dtype of x, where it is read.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from dig_jax.errors import suggest

Denoiser = Callable[[Float[Array, "b h w c"], Int[Array, " b"]], Float[Array, "b h w d"]]
"""(x_t, timesteps of the original process) -> noise [..., C], or noise and variance [..., 2C]."""

Image = Float[Array, "b h w c"]
PerImage = Float[Array, "b 1 1 1"]
Table = Float64[np.ndarray, " steps"]

_SCHEDULES = ("linear", "cosine")
_LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")
_FIXED_VARIANCES = ("small", "large")


class Prediction(NamedTuple):
    """What the denoiser says of x_t: p(x_{t-1} | x_t) = N(mean, exp(log_variance)), x_0 and the noise."""

    mean: Image
    log_variance: Image
    x0: Image
    epsilon: Image


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """A diffusion process of `length` steps; hashable, so that it may be a static argument of `jax.jit`.

    Wherever t appears it is an index [B] in 0 … length-1; an index outside gives NaN, not the nearest step.

    Attributes:
        schedule: "linear" (β from 1e-4 to 0.02 at 1000 steps, scaled by 1000/num_steps [D §4]) or "cosine"
            (ᾱ follows a squared cosine, β at most 0.999 [I 17]).
        num_steps: number of steps of the original process.
        learn_sigma: whether the denoiser returns a second half that interpolates the variance [I 15].
        loss_type: "mse": noise MSE, plus, for a learned variance, the bound's term of that step in bits per
            dimension, with no gradient to the mean; "rescaled_mse": that term × length/1000, so that the
            whole bound has the weight λ = 0.001 [I 16] for any length; "kl": the bound's term alone, mean
            and variance; "rescaled_kl": that × length, whose average over t is the whole bound.
        fixed_variance: the variance where learn_sigma is False: "small" (β̃_t) or "large" (β_t) [D §3.2].
        timesteps: the original timesteps that a respaced process keeps, increasing; None keeps all.

    Raises:
        ValueError: a field that is none of these.
    """

    schedule: str = "linear"
    num_steps: int = 1000
    learn_sigma: bool = True
    loss_type: str = "mse"
    fixed_variance: str = "large"
    timesteps: tuple[int, ...] | None = None

    def __post_init__(self):
        choices = {"schedule": _SCHEDULES, "loss_type": _LOSS_TYPES, "fixed_variance": _FIXED_VARIANCES}
        for field, accepted in choices.items():
            if (value := getattr(self, field)) not in accepted:
                hint = suggest(value, accepted)
                raise ValueError(f"{field} must be one of {accepted}, got {value!r}{hint}")
        # Fewer steps of the linear schedule would need a β of 1 or more.
        least = 21 if self.schedule == "linear" else 2
        if self.num_steps < least:
            raise ValueError(
                f"num_steps must be at least {least} for schedule {self.schedule!r}, got {self.num_steps}"
            )
        kept = self.timestep_map
        if len(kept) < 2 or kept[0] < 0 or kept[-1] >= self.num_steps or (np.diff(kept) <= 0).any():
            raise ValueError(
                f"timesteps must be two or more increasing integers in 0 … {self.num_steps - 1}, got {kept}"
            )

    @property
    def length(self) -> int:
        """Number of steps of this process; num_steps unless it is respaced."""
        return len(self.timestep_map)

    @cached_property
    def timestep_map(self) -> Int[np.ndarray, " steps"]:
        """The original timestep of each step of this process."""
        return np.arange(self.num_steps) if self.timesteps is None else np.array(self.timesteps, dtype=int)

    @cached_property
    def alphas_cumprod(self) -> Table:
        """ᾱ_t of [D 4]."""
        betas = _linear_betas(self.num_steps) if self.schedule == "linear" else _cosine_betas(self.num_steps)
        return np.cumprod(1 - betas)[self.timestep_map]

    @cached_property
    def alphas_cumprod_prev(self) -> Table:
        """ᾱ_{t-1}, with ᾱ_{-1} = 1."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas(self) -> Table:
        """α_t = 1 - β_t of [I 19]."""
        return self.alphas_cumprod / self.alphas_cumprod_prev

    @cached_property
    def betas(self) -> Table:
        """β_t of [I 19]."""
        return 1 - self.alphas

    @cached_property
    def posterior_variance(self) -> Table:
        """β̃_t of [D 7]."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> Table:
        """log β̃_t; the first, log 0, is replaced by the second."""
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
        """This process on the steps that `space_timesteps` picks from it [I 19]."""
        kept = self.timestep_map[space_timesteps(self.length, steps)]
        return dataclasses.replace(self, timesteps=tuple(kept.tolist()))

    def denoiser_timesteps(self, t: Int[Array, " b"]) -> Int[Array, " b"]:
        """The timesteps of the original process, which the denoiser was trained on, for indices t."""
        return jnp.asarray(self.timestep_map, t.dtype).at[t].get(out_sharding=jax.typeof(t).sharding)

    def q_sample(self, x0: Image, t: Int[Array, " b"], noise: Image) -> Image:
        """A sample of q(x_t | x_0) from standard normal noise [D 4]."""
        signal, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        return lookup(signal, t, x0) * x0 + lookup(sigma, t, x0) * noise

    def q_posterior(self, x0: Image, x_t: Image, t: Int[Array, " b"]) -> tuple[Image, PerImage, PerImage]:
        """Mean, variance and log variance (finite at t = 0 too) of q(x_{t-1} | x_t, x_0) [D 6, 7]."""
        coef_x0, coef_xt = self.posterior_mean_coef_x0, self.posterior_mean_coef_xt
        mean = lookup(coef_x0, t, x0) * x0 + lookup(coef_xt, t, x0) * x_t
        return mean, lookup(self.posterior_variance, t, x0), lookup(self.posterior_log_variance, t, x0)

    def predict_x0(self, x_t: Image, t: Int[Array, " b"], epsilon: Image) -> Image:
        """x_0 from x_t and its noise [D 15]."""
        recip, recipm1 = np.sqrt(1 / self.alphas_cumprod), np.sqrt(1 / self.alphas_cumprod - 1)
        return lookup(recip, t, x_t) * x_t - lookup(recipm1, t, x_t) * epsilon

    def predict_epsilon(self, x_t: Image, t: Int[Array, " b"], x0: Image) -> Image:
        """The noise that leads from x_0 to x_t [D 4]."""
        signal, sigma = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        return (x_t - lookup(signal, t, x_t) * x0) / lookup(sigma, t, x_t)

    def p_mean_variance(
        self, output: Float[Array, "b h w d"], x_t: Image, t: Int[Array, " b"], *, clip: bool = False
    ) -> Prediction:
        """The model's p(x_{t-1} | x_t) from the denoiser's output at x_t [D 15, I 15].

        Args:
            output: what the denoiser returned for (x_t, denoiser_timesteps(t)): d = 2c if learn_sigma else c.
            x_t: noisy images [B, H, W, C].
            t: indices [B].
            clip: limit x_0 to [-1, 1], for pixels; mean and epsilon follow it.

        Raises:
            ValueError: output has another number of channels.
        """
        epsilon, log_variance = self._interpret(output, x_t, t)
        x0 = self.predict_x0(x_t, t, epsilon)
        if clip:
            x0 = jnp.clip(x0, -1, 1)
            epsilon = self.predict_epsilon(x_t, t, x0)
        return Prediction(self.q_posterior(x0, x_t, t)[0], log_variance, x0, epsilon)

    def loss(
        self, denoiser: Denoiser, x0: Image, t: Int[Array, " b"], noise: Image
    ) -> dict[str, Float[Array, " b"]]:
        """Training loss of each image, from one evaluation of the denoiser.

        Returns:
            "loss": what loss_type says [B]; "mse": the noise MSE [D 14]; "vb": the bound's term of step t, in
            bits per dimension, not rescaled.
        """
        x_t = self.q_sample(x0, t, noise)
        output = denoiser(x_t, self.denoiser_timesteps(t))
        epsilon, v = jnp.split(output, [x0.shape[-1]], axis=-1)
        mse = _mean_per_image((noise - epsilon) ** 2)

        bound_only = self.loss_type in ("kl", "rescaled_kl")
        if not bound_only:
            output = jnp.concatenate([jax.lax.stop_gradient(epsilon), v], axis=-1)
        vb = self._bound(self.p_mean_variance(output, x_t, t), x0, x_t, t)

        scale = {"rescaled_mse": self.length / 1000, "rescaled_kl": self.length}.get(self.loss_type, 1)
        if bound_only:
            loss = scale * vb
        elif self.learn_sigma:
            loss = mse + scale * vb
        else:
            loss = mse
        return {"loss": loss, "mse": mse, "vb": vb}

    def _interpret(self, output: Array, x_t: Image, t: Int[Array, " b"]) -> tuple[Image, Image]:
        """Noise and log variance that the denoiser's output stands for."""
        channels = x_t.shape[-1]
        expected = 2 * channels if self.learn_sigma else channels
        if output.shape != (*x_t.shape[:-1], expected):
            raise ValueError(
                f"denoiser must return {expected} channels for images of {channels} with "
                f"learn_sigma={self.learn_sigma}, got shape {output.shape} for {x_t.shape}"
            )
        output = output.astype(x_t.dtype)
        if not self.learn_sigma:
            # At t = 0, "large" too takes the second β̃: a better likelihood of the data.
            large = np.log(np.append(self.posterior_variance[1], self.betas[1:]))
            table = self.posterior_log_variance if self.fixed_variance == "small" else large
            return output, jnp.broadcast_to(lookup(table, t, x_t), x_t.shape)
        w = (output[..., channels:] + 1) / 2
        upper, lower = lookup(np.log(self.betas), t, x_t), lookup(self.posterior_log_variance, t, x_t)
        return output[..., :channels], w * upper + (1 - w) * lower

    def _bound(
        self, prediction: Prediction, x0: Image, x_t: Image, t: Int[Array, " b"]
    ) -> Float[Array, " b"]:
        """L_{t-1}, at t = 0 L_0, in bits per dimension [D 5]."""
        mean, _, log_variance = self.q_posterior(x0, x_t, t)
        kl = normal_kl(mean, log_variance, prediction.mean, prediction.log_variance)
        decoder = -discretized_gaussian_log_likelihood(x0, prediction.mean, 0.5 * prediction.log_variance)
        return jnp.where(t == 0, _mean_per_image(decoder), _mean_per_image(kl)) / np.log(2)


def space_timesteps(num_steps: int, steps: int | str) -> list[int]:
    """The indices, increasing, that respacing keeps of 0 … num_steps-1.

    Args:
        num_steps: length of the process.
        steps: how many to keep. 250 or "250": evenly spaced from the first to the last. "10,15,20": so many
            from each of (here three) equal sections, evenly spaced within it. "ddim50": multiples of the
            smallest integer stride that keeps exactly 50 (Song et al. 2021, DDIM, appendix D.2).

    Raises:
        ValueError: steps is none of these, keeps fewer than two or more than there are, or no stride fits.
    """
    if match := re.fullmatch(r"ddim(\d+)", str(steps)):
        for stride in range(1, num_steps):
            if len(strided := range(0, num_steps, stride)) == int(match[1]):
                return list(strided)
        raise ValueError(f"steps must have an integer stride in {num_steps} timesteps, got {steps!r}")
    if not re.fullmatch(r"\d+(,\d+)*", str(steps)):
        raise ValueError(
            f"steps must be a number, numbers as in '10,15,20', or as in 'ddim50', got {steps!r}"
        )
    counts = [int(count) for count in str(steps).split(",")]
    if sum(counts) < 2:
        raise ValueError(f"steps must keep at least 2 timesteps, got {steps!r}")
    kept = []
    for section, count in zip(np.array_split(np.arange(num_steps), len(counts)), counts, strict=True):
        if not 1 <= count <= len(section):
            raise ValueError(f"steps must keep 1 … {len(section)} of each section's timesteps, got {steps!r}")
        stride = (len(section) - 1) / (count - 1) if count > 1 else 0.0
        # A running sum, not a product: halves then round as in the original code.
        offsets = np.cumsum([0.0] + [stride] * (count - 1))
        kept += section[np.round(offsets).astype(int)].tolist()
    return kept


def lookup(table: Table, t: Int[Array, " b"], x: Image) -> PerImage:
    """table[t] in x's dtype, shaped to broadcast over images; NaN where t is out of range."""
    sharding = jax.typeof(t).sharding
    values = jnp.asarray(table, x.dtype).at[t]
    values = values.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=sharding)
    return values[:, None, None, None]


def normal_kl(mean1: Array, log_variance1: Array, mean2: Array, log_variance2: Array) -> Array:
    """KL(N(mean1, exp(log_variance1)) ‖ N(mean2, exp(log_variance2))) in nats, element by element."""
    log_ratio = log_variance1 - log_variance2
    return 0.5 * (jnp.expm1(log_ratio) - log_ratio + (mean1 - mean2) ** 2 * jnp.exp(-log_variance2))


def discretized_gaussian_log_likelihood(x: Array, mean: Array, log_sigma: Array) -> Array:
    """Log-probability, in nats, of the 8-bit level x in a Gaussian integrated over that level's bin [D 13].

    Levels are -1, -1 + 2/255, …, 1; the two outermost bins reach to infinity. Probabilities below 1e-12 count
    as 1e-12.
    """
    upper = _standard_normal_cdf((x + 1 / 255 - mean) * jnp.exp(-log_sigma))
    lower = _standard_normal_cdf((x - 1 / 255 - mean) * jnp.exp(-log_sigma))
    probability = jnp.where(x > 0.999, 1.0, upper) - jnp.where(x < -0.999, 0.0, lower)
    return jnp.log(jnp.maximum(probability, 1e-12))


def _standard_normal_cdf(x: Array) -> Array:
    """Page's 1977 approximation, off by at most 2e-4; the bound of published models is computed with it."""
    return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _linear_betas(num_steps: int) -> Table:
    """β_t rising linearly [D §4], with the same total for every number of steps."""
    scale = 1000 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps)


def _cosine_betas(num_steps: int) -> Table:
    """β_t for which ᾱ_t is f(t) = cos²((t/T + 0.008) / 1.008 · π/2) over f(0) [I 17]."""
    f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def _mean_per_image(x: Image) -> Float[Array, " b"]:
    return jnp.mean(x, axis=(1, 2, 3))
