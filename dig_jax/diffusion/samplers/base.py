"""The interface of samplers, and the loop that all but the adaptive one share.

A sampler takes a denoiser and does not know about networks, labels or guidance. The caller supplies the noise
as a function of the step, so that the noise of an image can depend on its seed alone and not on its batch.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dig_jax.diffusion.piecewise import AnyDenoiser, Session, pieces
from dig_jax.diffusion.process import Denoiser, Images, Process

Noise = Callable[[Int[Array, ""]], Images]
"""(traced index of the denoiser's evaluation, from 0) -> standard normal noise of the images' shape."""

State = tuple[Images, ...]
"""x, and what a multistep method keeps of earlier evaluations."""

Step = Callable[[State, Int[Array, ""]], tuple[State, Images]]
"""(state, traced index of the evaluation) -> (next state, predicted x_0): one evaluation of the denoiser."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """The loop of a sampler: a scan with one evaluation of the denoiser in its body.

    Attributes:
        evaluations: number of iterations.
        step: one iteration.
        memory: number of arrays in the state in addition to x; they start at zero.
        start: scale of the noise that x starts from, as a multiple of the process's noise scale.
        per_step: iterations of a step; its first iteration predicts the step's x_0.
    """

    evaluations: int
    step: Step
    memory: int = 0
    start: float = 1.0
    per_step: int = 1


Trajectory = Float[Array, "steps b h w c"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseSampler(abc.ABC):
    """A sampler with its options.

    Subclasses are frozen dataclasses of hashable fields: a sampler compares, hashes and pickles by its
    options and can be a static argument of `jax.jit`. They validate their fields in `__post_init__` and
    raise ValueError with the option by name.

    Attributes:
        own_times: its options space the times of sampling, not the process and its shift.
        steps: number of steps, or another specification that the sampler supports.
        clip: limit every predicted x_0 to [-1, 1], for pixels.
    """

    evaluations_per_step: ClassVar[int] = 1
    own_times: ClassVar[bool] = False

    steps: int | str | None = None
    clip: bool = False

    @abc.abstractmethod
    def check(self, process: Process) -> None:
        """Raise ValueError if the sampler does not support the process or cannot honor its options on it."""

    @abc.abstractmethod
    def evaluations(self, process: Process) -> int | None:
        """Return how often a call evaluates the denoiser (NFE); None: only a run tells."""

    @abc.abstractmethod
    def __call__(
        self,
        process: Process,
        denoiser: AnyDenoiser,
        x: Images,
        noise: Noise,
        return_trajectory: bool = False,
    ) -> Any:
        """Draw images; `LoopSampler` describes `x`, `noise` and `return_trajectory`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopSampler(BaseSampler):
    """A sampler with a fixed number of evaluations, in one `lax.scan` per range of time."""

    @abc.abstractmethod
    def discretize(self, process: Process, denoiser: Denoiser, noise: Noise) -> Loop:
        """Return the loop over evaluations of the denoiser."""

    @abc.abstractmethod
    def fractions(self, process: Process) -> Float[np.ndarray, " n"]:
        """Return the time of each evaluation of the denoiser, from 0 (data) to 1 (noise)."""

    def evaluations(self, process: Process) -> int:
        """Return how often a call evaluates the denoiser (NFE)."""
        return len(self.fractions(process))

    @overload
    def __call__(
        self,
        process: Process,
        denoiser: AnyDenoiser,
        x: Images,
        noise: Noise,
        return_trajectory: Literal[False] = False,
    ) -> Images: ...

    @overload
    def __call__(
        self,
        process: Process,
        denoiser: AnyDenoiser,
        x: Images,
        noise: Noise,
        return_trajectory: Literal[True],
    ) -> tuple[Images, Trajectory]: ...

    def __call__(
        self,
        process: Process,
        denoiser: AnyDenoiser,
        x: Images,
        noise: Noise,
        return_trajectory: bool = False,
    ) -> Images | tuple[Images, Trajectory]:
        """Draw images.

        Args:
            process: the process that the denoiser was trained on.
            denoiser: (x [B, H, W, C], timesteps [B]) -> [B, H, W, C] or, with a variance, [B, H, W, 2C].
                It may differ between ranges of time (`Piecewise`), which takes one loop per range.
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
        state, trajectory = None, []
        for piece, steps in pieces(denoiser, self.fractions(process)):
            session = Session(piece)
            loop = self.discretize(process, session, noise)
            if state is None:
                scale = loop.start * process.noise_scale
                start = x if scale == 1 else (scale * x).astype(x.dtype)
                state = (start, *(jnp.zeros_like(x) for _ in range(loop.memory)))

            def body(carry: Any, i: Int[Array, ""], loop: Loop = loop, session: Session = session):
                state, session.memory = carry
                moved, x0 = loop.step(state, i)
                moved = tuple(part.astype(x.dtype) for part in moved)
                return (moved, session.memory), x0 if return_trajectory else None

            (state, _), predicted = jax.lax.scan(body, (state, session.start(x)), jnp.asarray(steps))
            trajectory.append(predicted)
        assert state is not None
        if not return_trajectory:
            return state[0]
        return state[0], jnp.concatenate(trajectory)[:: loop.per_step]
