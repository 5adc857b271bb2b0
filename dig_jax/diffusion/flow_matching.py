"""Flow matching: regression on a path in continuous time, for any kind of prediction.

[L] is Lipman et al. 2023, [S] Ma et al. 2024 (SiT), [J] Li & He 2025 (JiT), [H] Hang et al. 2023 (min-SNR).
`path.py` derives x_t, the velocity v and their conversions; `times.py` the times.

The denoiser predicts one of v, x, ε and α ε - σ x, and is trained by the mean squared error of its
prediction, times a weight that depends on t alone. The minimum over functions of x_t of E|v̂ - v|² is
E[v | x_t], the velocity that carries the distribution of x_t along t [L, theorem 2]. The other predictions
give the same velocity, because for given x_t and t they are affine functions of it.

Weights. At fixed x_t, an error of one kind is a multiple of an error of another: subtracting
x_t = α x + σ ε for the estimate and for the truth gives α Δx = -σ Δε, and with that

    |Δx| = f |Δ|,    f = 1 for x,   σ/α for ε,   σ/ω for v,   σ/(α² + σ²) for α ε - σ x      (ω of path.py)

    none       1: the loss is in the space of the prediction.
    velocity   (f ω/σ)²: the loss is the squared error of the velocity, whatever is predicted. The divisors α
               and σ of the predictions ε and x are limited to at least 0.05: on the linear path with x,
               the weight is min(1/t², 400), which is JiT's loss [J]: it clamps the divisor of both
               v = (x_t - x)/max(t, 0.05) and its estimate.
    min_snr    min(SNR, 5) f²: the loss of x with the weight min(SNR, 5) [H 4], SNR = α²/σ². Because
               SNR f² = g² with g = f α/σ finite at all ends, it is computed as min(g², 5 f²).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from dig_jax.diffusion.path import Level, Path, combine, convert
from dig_jax.diffusion.process import Images, Knots, PerImage, Process
from dig_jax.diffusion.times import Times, shifted
from dig_jax.errors import suggest

WEIGHTS = ("none", "velocity", "min_snr")
TRAINED = ("velocity", "x", "noise", "v")

_FLOOR = 0.05  # JiT's t_eps
_GAMMA = 5.0  # min-SNR's γ


@dataclasses.dataclass(frozen=True)
class FlowMatching:
    """A `Process` with times t in [0, 1] along a path.

    Attributes:
        path: from data to noise, a `Path` or its name; stored as a `Path`.
        prediction: what the denoiser predicts: "velocity", "x", "noise" or "v" (α ε - σ x). Only the first C
            channels of its output count; the released SiT models have C more, which nothing trains.
        times: distribution of the training times. Its shift also spaces the times of sampling.
        weight: "none", "velocity" or "min_snr".

    Raises:
        ValueError: a field is invalid; the message names it.
    """

    path: Path | str = "linear"
    prediction: str = "velocity"
    times: Times = Times()
    weight: str = "none"

    def __post_init__(self):
        object.__setattr__(self, "path", self.curve)
        for field, accepted in {"prediction": TRAINED, "weight": WEIGHTS}.items():
            if (value := getattr(self, field)) not in accepted:
                raise ValueError(
                    f"invalid {field}: got {value!r}; expected one of {', '.join(accepted)}"
                    f"{suggest(value, accepted)}"
                )

    @property
    def curve(self) -> Path:
        """The path."""
        return Path(self.path) if isinstance(self.path, str) else self.path

    @property
    def noise_scale(self) -> float:
        """The factor of the noise in x_t."""
        return self.curve.noise_scale

    def sample_times(self, keys: Key[Array, " b"]) -> PerImage:
        """Draw the time of each image from `times`."""
        return jnp.maximum(self.times.sample(keys), self.curve.first_time)

    def times_at(self, fractions: PerImage) -> PerImage:
        """Return quantiles of the training times."""
        return jnp.maximum(self.times.quantile(fractions), self.curve.first_time)

    def earlier(self, times: PerImage, fractions: PerImage) -> PerImage:
        """Return the times moved toward data by these fractions of the path."""
        return jnp.maximum(times - fractions, self.curve.first_time)

    def level_index(self, times: PerImage, count: int) -> Int[Array, " b"]:
        """Return the index of each time's range, out of `count` equal ranges of [0, 1]."""
        return jnp.minimum((times * count).astype(jnp.int32), count - 1)

    def timestep_input(self, times: PerImage) -> PerImage:
        """Return 1000 t, the range that the timestep embedding is made for."""
        return 1000 * times

    def fractions(self, times: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the times."""
        return times

    def corrupt(self, x0: Images, noise: Images, times: PerImage) -> Images:
        """Return x_t = α x_0 + σ ε."""
        level = self.level(times, x0)
        return level.alpha * x0 + level.sigma * noise

    def targets(self, x0: Images, noise: Images, times: PerImage) -> Images:
        """Return what the denoiser should predict."""
        return combine(x0, noise, self.prediction, self.level(times, x0))

    def loss(
        self, output: Float[Array, "b h w d"], *, x0: Images, noise: Images, x_t: Images, times: PerImage
    ) -> dict[str, PerImage]:
        """Return the training loss of each image; arguments as in `Process.loss`.

        Returns:
            "loss": the weighted error [B]. "mse": the error without a weight.
        """
        error = output[..., : x0.shape[-1]] - self.targets(x0, noise, times)
        mse = jnp.mean(error**2, axis=(1, 2, 3))
        return {"loss": self.weight_at(times) * mse, "mse": mse}

    def weight_at(self, times: PerImage) -> PerImage:
        """Return the weight of the squared error at these times."""
        level = self.curve.at(times)
        alpha, sigma = level.alpha, level.sigma
        if self.weight == "none":
            return jnp.ones_like(times)
        if self.weight == "velocity":
            divisor = {
                "velocity": level.omega,
                "x": jnp.maximum(sigma, _FLOOR * self.noise_scale),
                "noise": jnp.maximum(alpha, _FLOOR),
                "v": alpha**2 + sigma**2,
            }
            return (level.omega / divisor[self.prediction]) ** 2
        f, g = {
            "velocity": (sigma / level.omega, alpha / level.omega),
            "x": (1.0, alpha / sigma),
            "noise": (sigma / alpha, 1.0),
            "v": (sigma / (alpha**2 + sigma**2), alpha / (alpha**2 + sigma**2)),
        }[self.prediction]
        return jnp.broadcast_to(jnp.minimum(jnp.square(g), _GAMMA * jnp.square(f)), times.shape)

    def knots(self, steps: int | str | None) -> Knots:
        """Return steps + 1 times from noise to clean images, evenly spaced before the shift of `times`.

        The first time is 1, or 0.999 where the prediction does not determine x at α = 0.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"invalid steps: got {steps!r}; expected a positive integer")
        t = shifted(np.linspace(self.last_time, 0, steps + 1), self.times.shift)
        return self.knots_at(t)

    def knots_at(self, times: Float[np.ndarray, " knots"]) -> Knots:
        """Return knots at these times; 0 is clean images."""
        return Knots(times, self.curve.at(times))

    @property
    def last_time(self) -> float:
        """The greatest time at which the prediction determines x."""
        return 0.999 if self.prediction == "noise" and self.curve.name != "vp" else 1.0

    def predict_image(
        self, output: Float[Array, "b h w d"], x_t: Images, times: PerImage, *, clip: bool = False
    ) -> Images:
        """Return the denoiser's estimate of x_0 given its output at x_t."""
        x0 = self.predict(output, "x", x_t, times)
        return jnp.clip(x0, -1, 1) if clip else x0

    def predict(self, output: Float[Array, "b h w d"], kind: str, x_t: Images, times: PerImage) -> Images:
        """Return the estimate of `kind`, one of PREDICTIONS, given the output at x_t and `times`."""
        prediction = output[..., : x_t.shape[-1]].astype(x_t.dtype)
        return convert(prediction, self.prediction, kind, x_t, self.level(times, x_t))

    def level(self, times: PerImage, x: Images) -> Level:
        """Return the path's coefficients in the dtype of x, shaped to broadcast over images."""
        return Level(*(part.astype(x.dtype)[:, None, None, None] for part in self.curve.at(times)))


def as_flow(process: Process, sampler: str) -> FlowMatching:
    """Return the process, or raise ValueError that the sampler supports only flow matching."""
    if not isinstance(process, FlowMatching):
        raise ValueError(
            f"unsupported process for {sampler}: got {type(process).__name__}; expected FlowMatching"
        )
    return process
