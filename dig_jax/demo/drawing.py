"""Batches of a demo: one fixed batch size, compiled programs, and previews while a batch is drawn.

All batches have the same size: smaller ones are padded. A compiled program computes each image of a batch in
the same way, so an image has the same bits alone and beside others.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from dig_jax.demo.engine import Pixels, Watch
from dig_jax.demo.request import Menu, Program
from dig_jax.diffusion import SAMPLERS, MeanFlow
from dig_jax.diffusion.process import Denoiser, Images, Process
from dig_jax.diffusion.samplers import LoopSampler
from dig_jax.diffusion.samplers.base import Loop, Noise, State
from dig_jax.errors import UserError
from dig_jax.sampling.generate import generate
from dig_jax.sampling.sampler import Sampler, to_pixels

log = logging.getLogger(__name__)

_STEPS = (5, 10, 20, 50, 100, 250)
_SCALES = (1.5, 2)
# Compiled programs in memory; the least recently used one is dropped.
_PROGRAMS = 16
# Any scale with guidance: it is an argument of the compiled program.
_GUIDED = 1.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchedSampler(LoopSampler):
    """A sampler that shows its predicted images to a function on the host.

    Attributes:
        sampler: draws the images.
        show: called after each evaluation with its index, from 0, and the predicted images.
    """

    sampler: LoopSampler
    show: Callable[[Any, Any], None]

    def check(self, process: Process) -> None:
        """Raise ValueError as the sampler does."""
        self.sampler.check(process)

    def fractions(self, process: Process) -> Float[np.ndarray, " n"]:
        """Return the times of the sampler."""
        return self.sampler.fractions(process)

    def discretize(self, process: Process, denoiser: Denoiser, noise: Noise) -> Loop:
        """Return the loop of the sampler, which also shows its predictions."""
        loop = self.sampler.discretize(process, denoiser, noise)

        def step(state: State, i: Int[Array, ""]) -> tuple[State, Images]:
            moved, x0 = loop.step(state, i)
            jax.debug.callback(self.show, i, x0)
            return moved, x0

        return dataclasses.replace(loop, step=step)


class Drawer:
    """Draws batches with a sampler; a `Draw` for the engine.

    Attributes:
        sampler: the loaded model.
        batch_size: images of each batch.
        menu: what it can draw.
    """

    def __init__(self, sampler: Sampler, batch_size: int):
        """Find out what the model can draw.

        Raises:
            UserError: a PNG file cannot hold the images.
        """
        self.sampler, self.batch_size = sampler, batch_size
        channels = sampler.output_shape[2]
        if channels not in (1, 3):
            raise UserError(f"unsupported images of {channels} channels; expected gray or RGB images")
        self.menu = _menu(sampler)
        self._watch: Watch | None = None
        self._colors: Float[np.ndarray, "latent rgb"] | None = None
        self._compiled = functools.lru_cache(maxsize=_PROGRAMS)(self._compile)

    def __call__(
        self,
        program: Program,
        labels: Sequence[int],
        seeds: Sequence[int],
        scales: Sequence[float],
        watch: Watch | None,
    ) -> Pixels:
        """Draw a batch; see `Draw`."""
        count = len(seeds)
        indices = np.minimum(np.arange(self.batch_size), count - 1)
        draw = self._compiled(program)
        self._watch = watch
        try:
            x, _ = draw(
                labels=np.asarray(labels, np.int32)[indices],
                seeds=np.asarray(seeds, np.int32)[indices],
                scale=np.asarray(scales, np.float32)[indices].reshape(-1, 1, 1, 1),
            )
            x = np.asarray(x)
            jax.effects_barrier()  # a late preview would belong to the next batch
        finally:
            self._watch = None
        # Latents are decoded in whole batches too, whose rounding does not depend on the request.
        images = self.sampler.decode(x)
        self._fit_colors(x, images)
        return images[:count]

    def evaluations(self, program: Program) -> int:
        """Return how often the sampler evaluates the denoiser."""
        spec = self.sampler.request(program.size, **_options(program)).spec
        assert isinstance(spec.sampler, LoopSampler)
        return spec.sampler.evaluations(spec.process)

    def _compile(self, program: Program) -> Callable[..., Any]:
        started = time.monotonic()
        spec, weak_params, _ = self.sampler.request(program.size, **_options(program))
        assert isinstance(spec.sampler, LoopSampler)
        spec = dataclasses.replace(spec, sampler=WatchedSampler(sampler=spec.sampler, show=self._show))
        vector = jnp.zeros(self.batch_size, jnp.int32)
        scale = jnp.zeros((self.batch_size, 1, 1, 1), jnp.float32)
        compiled = generate.lower(
            self.sampler.params, labels=vector, seeds=vector, scale=scale, spec=spec, weak_params=weak_params
        ).compile()
        height, width = program.size
        log.info(
            "compiled %s, %d steps, %d × %d pixels in %.1f s",
            program.sampler,
            program.steps,
            height,
            width,
            time.monotonic() - started,
        )
        return functools.partial(compiled, self.sampler.params, weak_params=weak_params)

    def _show(self, i: Any, x0: Any) -> None:
        """Send predicted images to the one who watches; runs in a thread of JAX."""
        if (watch := self._watch) is not None:
            watch(int(i) + 1, self._preview(np.asarray(x0)))

    def _preview(self, x: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n h w colors"]:
        """Return predicted images as pixels; latents as small images in approximate colors."""
        if self.sampler.components.autoencoder is None:
            return to_pixels(x)
        if self._colors is None:
            return to_pixels(np.clip(x[..., :1] / 3, -1, 1))
        return to_pixels(_with_one(x) @ self._colors)

    def _fit_colors(
        self, x: Float[np.ndarray, "n h w c"], images: UInt8[np.ndarray, "n height width colors"]
    ) -> None:
        """Fit the colors of latents to the first batch: decoding every prediction would take long.

        A linear map from the channels of a latent pixel to the mean color of the pixels that it stands for.
        """
        if self.sampler.components.autoencoder is None or self._colors is not None:
            return
        count, height, width, _ = x.shape
        factor = images.shape[1] // height
        blocks = images.reshape(count, height, factor, width, factor, -1).mean((2, 4)) / 127.5 - 1
        rows = _with_one(x).reshape(count * height * width, -1)
        self._colors = np.linalg.lstsq(rows, blocks.reshape(len(rows), -1), rcond=1e-3)[0]


def _with_one(x: Float[np.ndarray, "*n c"]) -> Float[np.ndarray, "*n d"]:
    return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)


def _options(program: Program) -> dict[str, Any]:
    return {
        "sampler": program.sampler,
        "steps": program.steps,
        "guidance_scale": _GUIDED if program.guided else 1.0,
    }


def _menu(sampler: Sampler) -> Menu:
    """Return the samplers, steps and sizes that a model can draw with."""
    defaults = sampler.components.config.sampling
    steps = tuple(sorted({*_STEPS, defaults.steps}))

    def draws(size: tuple[int, int] | None = None, **options: Any) -> bool:
        try:
            spec = sampler.request(size, **options).spec
        except ValueError:
            return False
        return isinstance(spec.sampler, LoopSampler)  # the adaptive one may take any number of steps

    samplers = [name for name in SAMPLERS if all(draws(sampler=name, steps=number) for number in steps)]
    if not samplers:
        raise UserError("no sampler with a number of steps supports the model; expected ddim or euler")
    default = defaults.sampler if defaults.sampler in samplers else samplers[0]
    height, width, _ = sampler.output_shape
    components = sampler.components
    factor = height // components.image_spec.image_shape[0]
    buckets = [(factor * rows, factor * columns) for rows, columns in components.bucket_sizes]
    trained = tuple(dict.fromkeys([(height, width), *buckets]))
    scaled = [(int(scale * height), int(scale * width)) for scale in _SCALES]
    untrained = [size for size in scaled if size not in trained and draws(size, sampler=default)]
    scale = float(defaults.guidance_scale)
    min_scale, max_scale = _scales(components.diffusion, scale)
    if not draws(sampler=default, guidance_scale=_GUIDED):  # such as without a trained null class
        min_scale, max_scale = 1.0, 1.0
    return Menu(
        class_names=components.image_spec.class_names,
        samplers=(default, *(name for name in samplers if name != default)),
        steps=steps,
        default_steps=defaults.steps,
        sizes=(*trained, *untrained),
        trained=len(trained),
        default_scale=scale,
        min_scale=min_scale,
        max_scale=max_scale,
    )


def _scales(process: Process, default: float) -> tuple[float, float]:
    """Return the least and the greatest scale of guidance, with the config's between them."""
    if isinstance(process, MeanFlow):
        return 1.0, process.guidance_max
    return Menu.min_scale, max(Menu.max_scale, default)
