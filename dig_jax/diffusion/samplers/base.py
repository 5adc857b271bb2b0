"""The interface of samplers, and the loop that they share.

A sampler takes a denoiser and does not know about networks, labels or guidance. The caller supplies the noise
as a function of the step, so that the noise of an image can depend on its seed alone and not on its batch.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dig_jax.diffusion.process import Denoiser, Images, Process

Noise = Callable[[Int[Array, ""]], Images]
"""(traced index 0 … steps-1 of the step) -> standard normal noise of the images' shape."""

Step = Callable[[Images, Int[Array, ""]], tuple[Images, Images]]
"""(x, traced index of the step) -> (next x, predicted x_0)."""

Trajectory = Float[Array, "steps b h w c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseSampler(abc.ABC):
    """A sampler with its options.

    Subclasses are frozen dataclasses of hashable fields: a sampler compares, hashes and pickles by its
    options and can be a static argument of `jax.jit`. They validate their fields in `__post_init__` and
    raise ValueError with the option by name.

    Attributes:
        steps: number of steps, or another specification that the sampler supports.
        clip: limit every predicted x_0 to [-1, 1], for pixels.
    """

    steps: int | str | None = None
    clip: bool = False

    @abc.abstractmethod
    def check(self, process: Process) -> None:
        """Raise ValueError if the sampler does not support the process or cannot honor its options on it."""

    @abc.abstractmethod
    def discretize(self, process: Process, denoiser: Denoiser, noise: Noise) -> tuple[int, Step]:
        """Return the number of steps and the function that takes one of them."""

    @overload
    def __call__(
        self,
        process: Process,
        denoiser: Denoiser,
        x: Images,
        noise: Noise,
        return_trajectory: Literal[False] = False,
    ) -> Images: ...

    @overload
    def __call__(
        self,
        process: Process,
        denoiser: Denoiser,
        x: Images,
        noise: Noise,
        return_trajectory: Literal[True],
    ) -> tuple[Images, Trajectory]: ...

    def __call__(
        self,
        process: Process,
        denoiser: Denoiser,
        x: Images,
        noise: Noise,
        return_trajectory: bool = False,
    ) -> Images | tuple[Images, Trajectory]:
        """Draw images.

        Args:
            process: the process that the denoiser was trained on.
            denoiser: (x [B, H, W, C], timesteps [B]) -> [B, H, W, C] or, with a variance, [B, H, W, 2C].
            x: standard normal noise to start from; the result has its dtype.
            noise: a function of the step's index that returns standard normal noise; deterministic samplers
                never call it.
            return_trajectory: also return the x_0 predicted at each step [steps, B, H, W, C].

        Returns:
            The images [B, H, W, C], or (images, trajectory).

        Raises:
            ValueError: as `check`.
        """
        self.check(process)
        count, step = self.discretize(process, denoiser, noise)

        def body(x: Images, i: Int[Array, ""]) -> tuple[Images, Any]:
            moved, x0 = step(x, i)
            return moved.astype(x.dtype), x0 if return_trajectory else None

        x, trajectory = jax.lax.scan(body, x, jnp.arange(count))
        return (x, trajectory) if return_trajectory else x
