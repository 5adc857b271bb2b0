"""The interface of a diffusion process: what training, sampling and metrics need to know about it.

A process corrupts images with noise along a time axis and defines the loss of a denoiser at each time. The
discrete `GaussianDiffusion` is one process; a continuous path such as flow matching is another.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int, Key, Num

from dig_jax.diffusion.path import Level

Images = Float[Array, "b h w c"]
PerImage = Float[Array, " b"]
Times = Num[Array, " b"]

Denoiser = Callable[[Images, Num[Array, "b ..."]], Float[Array, "b h w d"]]
"""(x_t, timesteps) -> output, with the timesteps [B] that `Process.timestep_input` returns.

A flow map also takes [B, 2], with the lengths of the steps; see `samplers/mean_flow.py`.
"""


class Knots(NamedTuple):
    """The times that a sampler visits, from noise to data, and the path there.

    Attributes:
        times: times of the process [steps + 1]; the last one stands for clean images.
        level: the path's coefficients at these times, in float64; σ = 0 for clean images. The derivatives
            are by `times`, and may be undefined for clean images.
    """

    times: Num[np.ndarray, " knots"]
    level: Level


@runtime_checkable
class Process(Protocol):
    """A forward process from images to noise, and the loss of a denoiser on it.

    Implementations are frozen dataclasses, so that a process hashes and compares by its fields and can be a
    static argument of `jax.jit`. Each image has one time; the process chooses its dtype and range.
    """

    @property
    def noise_scale(self) -> float:
        """Deviation of the noise that sampling starts from."""
        ...

    def sample_times(self, keys: Key[Array, " b"], /) -> Times:
        """Draw the training time of each image from its key in `keys`."""
        ...

    def times_at(self, fractions: PerImage, /) -> Times:
        """Return quantiles of the distribution of training times, for fractions in [0, 1).

        Evenly spread fractions give evenly spread times, which is how the held-out loss chooses them.
        """
        ...

    def earlier(self, times: Times, fractions: PerImage, /) -> Times:
        """Return the times moved toward data by these fractions of the whole range, as far as it goes."""
        ...

    def level_index(self, times: Times, count: int, /) -> Int[Array, " b"]:
        """Return the index of each time's range, out of `count` equal ranges from least to most noise."""
        ...

    def timestep_input(self, times: Times, /) -> Num[Array, " b"]:
        """Return the timesteps from 0 to 1000 that the denoiser takes at these times."""
        ...

    def fractions(self, times: Num[np.ndarray, " n"], /) -> Float[np.ndarray, " n"]:
        """Return times as fractions of the process, from 0 (data) to 1 (noise)."""
        ...

    def corrupt(self, x0: Images, noise: Images, times: Times, /) -> Images:
        """Return x_t: the images with standard normal noise mixed in."""
        ...

    def targets(self, x0: Images, noise: Images, times: Times, /) -> Images:
        """Return the target of the first C channels of the denoiser's output."""
        ...

    def loss(
        self, output: Float[Array, "b h w d"], /, *, x0: Images, noise: Images, x_t: Images, times: Times
    ) -> dict[str, PerImage]:
        """Return the training loss of each image as "loss", and its terms by name.

        Args:
            output: the denoiser's output for (x_t, timestep_input(times)).
            x0: clean images.
            noise: the noise in x_t.
            x_t: corrupt(x0, noise, times).
            times: one time per image.
        """
        ...

    def knots(self, steps: int | str | None, /) -> Knots:
        """Return the times of a sampler with this number of steps; the last knot is clean images.

        Raises:
            ValueError: invalid steps.
        """
        ...

    def predict_image(
        self, output: Float[Array, "b h w d"], x_t: Images, times: Times, /, *, clip: bool = False
    ) -> Images:
        """Return the denoiser's estimate of x_0, limited to [-1, 1] with `clip`, given its output at x_t."""
        ...
