"""Guidance of a denoiser: a rule, the times at which it holds, the channels, and rescaling."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Num

from dig_jax.diffusion.flow_matching import FlowMatching
from dig_jax.diffusion.gaussian import GaussianDiffusion
from dig_jax.diffusion.guidance.rules import ClassifierFree, Rule, Space
from dig_jax.diffusion.path import convert
from dig_jax.diffusion.piecewise import TOLERANCE, AnyDenoiser, Piecewise, Remembering, ranges
from dig_jax.diffusion.process import Denoiser, Images, Process

Output = Float[Array, "b h w d"]
Pair = Callable[[Images, Num[Array, " b"]], tuple[Output, Output]]
"""(x, timesteps) -> the stronger and the weaker output."""

# The kinds of evaluation, by the networks that they run.
ZERO, PLAIN, GUIDED = 0, 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Static description of guidance; its scale is an argument of a call.

    Attributes:
        rule: how the predictions are combined.
        interval: (low, high), the times with guidance as fractions of the process, 1 is noise (Kynkäänniemi
            et al. 2024). At other times the weaker model is not evaluated.
        rescale: φ of Lin et al. 2024, section 3.4: the guided output g becomes (φ std(s)/std(g) + 1 - φ) g,
            with the deviations of one image over its guided channels, in the network's output. 0: no
            rescaling.
        channels: number of leading channels to guide; None: all. Others, such as the variance, are those of
            the stronger output.

    Raises:
        ValueError: a field is invalid; the message names it.
    """

    rule: Rule = ClassifierFree()
    interval: tuple[float, ...] = (0.0, 1.0)
    rescale: float = 0.0
    channels: int | None = None

    def __post_init__(self):
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(
                f"invalid interval: got {self.interval}; expected two increasing numbers between 0 and 1"
            )
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"invalid rescale: got {self.rescale}; expected a number between 0 and 1")

    def check(self, process: Process) -> None:
        """Raise ValueError if the rule is not defined for the process."""
        if self.rule.space == "velocity" and not isinstance(process, FlowMatching):
            raise ValueError(
                f"unsupported process for {type(self.rule).__name__}: got {type(process).__name__}; expected"
                " FlowMatching"
            )

    def kinds(self, fractions: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return ZERO, PLAIN or GUIDED for each time of a sampler.

        Raises:
            ValueError: the velocity is zero at all of them.
        """
        kinds = np.array([ZERO, PLAIN, GUIDED, PLAIN])[ranges(self._bounds, fractions)]
        if (kinds == ZERO).all():
            raise ValueError(
                f"invalid zero_init={self.rule.zero_init:g} for {len(kinds)} evaluations, all of which would"
                " be zero; expected more steps, or zero_init=0"
            )
        return kinds

    def __call__(
        self, plain: Denoiser, pair: Pair, scale: ArrayLike, process: Process | None = None
    ) -> AnyDenoiser:
        """Return the guided denoiser.

        Args:
            plain: the stronger denoiser alone.
            pair: both denoisers.
            scale: a number, or one per image of shape [B, 1, 1, 1]; 1 is the stronger denoiser.
            process: the process of the denoisers, for rules that do not combine the outputs as they are.
        """
        if process is not None:
            self.check(process)

        def evaluate(x: Images, t: Array, memory: Images | None) -> tuple[Output, Images | None]:
            count = x.shape[-1] if self.channels is None else self.channels
            if not 1 <= count <= x.shape[-1]:
                raise ValueError(
                    f"channels out of range: got {self.channels}; expected 1 … {x.shape[-1]} or None"
                )
            strong, weak = pair(x, t)
            space = _Space(self.rule.space, process, x[..., :count], t)
            first = strong[..., :count]
            guided, next_memory = self.rule.combine(
                space.enter(first),
                space.enter(weak[..., :count]),
                jnp.asarray(scale, strong.dtype),
                None if memory is None else memory[..., :count],
            )
            guided = self._rescaled(space.leave(guided), first)
            if next_memory is not None:
                rest = jnp.zeros_like(x[..., count:])
                next_memory = jnp.concatenate([next_memory.astype(x.dtype), rest], axis=-1)
            return jnp.concatenate([guided, strong[..., count:]], axis=-1), next_memory

        def guided(x: Images, t: Array) -> Output:
            return evaluate(x, t, None)[0]

        def still(x: Images, t: Array) -> Output:
            return _Space("velocity", process, x, t).leave(jnp.zeros_like(x))

        guide = Remembering(evaluate) if self.rule.remembers else guided
        always = self.interval == (0.0, 1.0) and not self.rule.zero_init
        return guide if always else Piecewise((still, plain, guide, plain), self._bounds)

    @property
    def _bounds(self) -> tuple[float, float, float]:
        """The end of zero velocity, and both ends of the interval."""
        low, high = self.interval
        top = 1 - self.rule.zero_init
        below = low - 2 * TOLERANCE  # low itself is in the interval
        return top, min(high, top), min(below, top)

    def _rescaled(self, guided: Output, strong: Output) -> Output:
        if not self.rescale:
            return guided
        ratio = _deviation(strong) / jnp.maximum(_deviation(guided), 1e-12)
        return (self.rescale * ratio + 1 - self.rescale) * guided


@dataclasses.dataclass(frozen=True)
class _Space:
    """Conversion of a network's predictions at x_t and t to the space of a rule, and back."""

    name: Space
    process: Process | None
    x: Images
    timesteps: Num[Array, " b"]

    def enter(self, output: Output) -> Images:
        return output if self.name == "output" else self._convert(output, True)

    def leave(self, prediction: Images) -> Output:
        return prediction if self.name == "output" else self._convert(prediction, False)

    def _convert(self, values: Images, enters: bool) -> Images:
        process, values = self.process, values.astype(self.x.dtype)
        if isinstance(process, FlowMatching):
            space = {"image": "x", "velocity": "velocity"}[self.name]
            source, target = (process.prediction, space) if enters else (space, process.prediction)
            level = process.level(self.timesteps / 1000, self.x)
            return convert(values, source, target, self.x, level)
        if isinstance(process, GaussianDiffusion):
            # Timesteps count the levels of the process before respacing.
            whole = dataclasses.replace(process, timesteps=None)
            function = whole.predict_x0 if enters else whole.predict_epsilon
            return function(self.x, self.timesteps, values)
        raise ValueError(f"invalid process: got {process!r}; expected FlowMatching or GaussianDiffusion")


def _deviation(x: Output) -> Float[Array, "b 1 1 1"]:
    return jnp.std(x, axis=(1, 2, 3), keepdims=True)
