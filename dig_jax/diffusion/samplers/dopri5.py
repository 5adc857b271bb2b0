"""Adaptive Dormand-Prince: the probability flow to a tolerance instead of in a number of steps.

The pair of orders 5 and 4 (Dormand & Prince 1980) estimates the error of each step as the difference of both
results. diffrax repeats a step whose error is too large, and chooses the size of the next one. Each image has
its own steps, so that it does not depend on its batch: `vmap` runs one solver per image, and the denoiser is
evaluated for the whole batch at a different time per image. Images that are done wait for the slowest one.

A step takes 6 evaluations, because its last one is the first one of the next step (FSAL), and each range of
time takes one more. Where diffrax repeats the first step, it evaluates its start again; these few evaluations
are not counted.

The velocity of some predictions is infinite at t = 0. So the solver stops at `last_time`, and a last
evaluation predicts the images, as in the other samplers. On the linear path and data N(m, s²), this leaves an
error of order t²/s².
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from dig_jax.diffusion.flow_matching import FlowMatching, as_flow
from dig_jax.diffusion.path import convert
from dig_jax.diffusion.piecewise import AnyDenoiser, Remembering, spans
from dig_jax.diffusion.process import Denoiser, Images, PerImage, Process
from dig_jax.diffusion.samplers.base import BaseSampler, Noise
from dig_jax.errors import install_command

_FIRST_STEP = 0.01  # of the range of time; the solver adapts it at once
MOMENTUM = "unsupported guidance with momentum for dopri5, which repeats steps; expected momentum=0"


class Span(NamedTuple):
    """A range of time with one denoiser.

    Attributes:
        middle: a time of the range.
        evaluations: number of evaluations of the denoiser for each image, 6 per step and 1.
    """

    middle: float
    evaluations: Int[Array, " b"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dopri5(BaseSampler):
    """Dormand-Prince 5(4) on the velocity of a `FlowMatching` process; `steps` has no effect.

    Attributes:
        rtol: tolerated error of a step, relative to |x|.
        atol: tolerated error of a step where |x| is small. The root mean square of error/(atol + rtol |x|)
            over an image is at most 1.
        last_time: time of the last evaluation.
        max_steps: greatest number of steps, repeated ones included, in each range of time. An image that
            needs more becomes NaN.
    """

    own_times: ClassVar[bool] = True

    rtol: float = 1e-5
    atol: float = 1e-5
    last_time: float = 1e-3
    max_steps: int = 1000

    def __post_init__(self):
        for name in ("rtol", "atol", "max_steps"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"invalid {name}: got {value}; expected a positive number")
        if not 0 < self.last_time < 0.5:
            raise ValueError(f"invalid last_time: got {self.last_time}; expected a number between 0 and 0.5")

    def check(self, process: Process) -> None:
        """Raise ValueError if the process is not flow matching, or if diffrax is not installed."""
        as_flow(process, type(self).__name__)
        try:
            import diffrax  # noqa: F401
            import equinox  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"the sampler dopri5 needs the package diffrax: {install_command('ode')}"
            ) from error

    def evaluations(self, process: Process) -> None:
        """Return None: `solve` counts them."""

    def __call__(
        self,
        process: Process,
        denoiser: AnyDenoiser,
        x: Images,
        noise: Noise,
        return_trajectory: bool = False,
    ) -> Images:
        """Draw images; arguments as in `LoopSampler.__call__`, but without a trajectory.

        Raises:
            ValueError: as `check` and `solve`, or for `return_trajectory`.
        """
        if return_trajectory:
            raise ValueError("unsupported sampler of a trajectory: got 'dopri5'; expected a number of steps")
        return self.solve(process, denoiser, x)[0]

    def solve(self, process: Process, denoiser: AnyDenoiser, x: Images) -> tuple[Images, tuple[Span, ...]]:
        """Return images and the evaluations in each range of time.

        Raises:
            ValueError: as `check`, or a denoiser that remembers its previous evaluation.
        """
        self.check(process)
        process = as_flow(process, type(self).__name__)
        x = (process.noise_scale * x).astype(x.dtype)
        counted, times = [], jnp.zeros(x.shape[:1], x.dtype)
        for piece, start, end in spans(denoiser, process.last_time, self.last_time):
            if isinstance(piece, Remembering):
                raise ValueError(MOMENTUM)
            times = jnp.full_like(times, end)
            x, steps, reached = self._integrate(process, piece, x, start, end)
            x = jnp.where(reached[:, None, None, None], x, jnp.nan)
            counted.append(Span((start + end) / 2, 6 * steps + 1))
        x = process.predict_image(piece(x, process.timestep_input(times)), x, times, clip=self.clip)
        counted.append(Span(self.last_time, jnp.ones_like(counted[-1].evaluations)))
        return x, tuple(counted)

    def _integrate(
        self, process: FlowMatching, denoiser: Denoiser, x: Images, start: float, end: float
    ) -> tuple[Images, Int[Array, " b"], Bool[Array, " b"]]:
        """Follow the flow; return the images, their numbers of steps, and whether they reached the end."""
        import diffrax
        import equinox

        def velocity(x: Images, times: PerImage) -> Images:
            output = denoiser(x, process.timestep_input(times))
            if not self.clip:
                return process.predict(output, "velocity", x, times)
            image = process.predict_image(output, x, times, clip=True)
            return convert(image, "x", "velocity", x, process.level(times, x))

        # The arrays that the denoiser closes over become arguments, as custom_vmap needs them.
        closed = equinox.filter_closure_convert(velocity, x, jnp.zeros(x.shape[:1], x.dtype))
        arrays, static = equinox.partition(closed, equinox.is_array)

        @custom_vmap
        def of_one(t: Array, y: Float[Array, "h w c"], arrays: Any) -> Float[Array, "h w c"]:
            whole: Any = equinox.combine(arrays, static)
            return whole(jnp.broadcast_to(y, x.shape), jnp.full(x.shape[:1], t, x.dtype))[0]

        @of_one.def_vmap
        def _(_size: Any, _batched: object, t: Array, y: Images, arrays: Any) -> tuple[Images, bool]:
            whole: Any = equinox.combine(arrays, static)
            return whole(y, jnp.broadcast_to(t, x.shape[:1]).astype(x.dtype)), True

        def solve_one(y: Float[Array, "h w c"]) -> tuple[Array, Array, Array]:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, arrays: of_one(t, y, arrays)),
                diffrax.Dopri5(),
                start,
                end,
                _FIRST_STEP * (end - start),
                y,
                arrays,
                stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
                adjoint=diffrax.ForwardMode(),
                max_steps=self.max_steps,
                throw=False,
            )
            assert solution.ys is not None
            reached = solution.result == diffrax.RESULTS.successful
            return solution.ys[0], solution.stats["num_steps"], reached

        return jax.vmap(solve_one)(x)
