"""`Sampler` and `load`: images from a trained model, each a function of its seed and label alone."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Int32, UInt8

from dig_jax.autoencoder import Autoencoder, to_uint8
from dig_jax.checkpoints.frozen_model import read_frozen_model
from dig_jax.checkpoints.reader import model_path, read_model
from dig_jax.components import Components, ModelSpec, Params
from dig_jax.config import Config, check_same
from dig_jax.data.class_names import class_index
from dig_jax.diffusion.samplers import Dopri5
from dig_jax.errors import naming_implementation, naming_setting
from dig_jax.parallel import (
    batch_sharding,
    batch_shards,
    distribute,
    local_mesh,
    replicated,
    sampling_mesh,
    state_sharding,
)
from dig_jax.sampling.generate import generate
from dig_jax.sampling.generation_spec import GenerationSpec, needs_weak_model, with_options

Numbers = int | Sequence[int] | np.ndarray | None
Labels = Numbers | str | Sequence[str]
Size = int | np.integer | tuple[int, int] | None

# Latent pixels that each device decodes at once: 4 images of 256×256 pixels or one of 512×512. They take
# about 1 GB, in addition to what training keeps on the device.
_DECODED_LATENT_PIXELS = 64 * 64


class Request(NamedTuple):
    """What drawing depends on besides the model's parameters, labels and seeds.

    Attributes:
        spec: the static values.
        weak_params: parameters of the weaker model, if guidance needs one.
        scale: scale of guidance.
    """

    spec: GenerationSpec
    weak_params: Params | None
    scale: float


class Sampler:
    """A function that draws images from a model, with defaults from the config's `sampling`.

    Attributes:
        components: model, diffusion process and data.
        params: the parameters that it draws with.
        step: training step of the parameters.
    """

    def __init__(self, components: Components, params: Params, *, step: int, mesh: Mesh | None = None):
        self.components, self.params, self.step, self._mesh = components, params, step, None
        self._weak_models: dict[str, tuple[ModelSpec, Params]] = {}
        if mesh is not None:
            self._mesh = sampling_mesh(mesh)
            self.params = jax.device_put(params, state_sharding(params, self._mesh))

    def __call__(
        self,
        labels: Labels = None,
        *,
        seeds: Numbers = None,
        sampler: str | None = None,
        steps: int | np.integer | None = None,
        guidance_scale: float | None = None,
        size: Size = None,
        return_latents: bool = False,
        **options: Any,
    ) -> UInt8[np.ndarray, "n height width c"] | Float[np.ndarray, "n height width c"]:
        """Draw one image per seed.

        Args:
            labels: one class per image, or one for all, as an index or a name. By default, the image of
                seed s has class s modulo the number of classes.
            seeds: non-negative integers, one per image; by default 0, 1, … for each label.
            sampler: a name in `dig_jax.diffusion.SAMPLERS`, such as "ddim".
            steps: number of sampling steps.
            guidance_scale: scale of guidance; 1 is no guidance. With classifier-free guidance, the prediction
                is null + scale·(class - null) (Ho & Salimans 2022).
            size: (height, width) in pixels, or one number for both; by default the training images' size.
            return_latents: return float32 images in the model's space instead of decoded pixels.
            options: other fields of `config.sampling`: sampler_options, time_shift, clip, guidance,
                guidance_options, guidance_channels, guidance_interval, guidance_rescale,
                internal_guidance_scale, cache_interval, cache_order, weak_model.

        Raises:
            ValueError: invalid labels, seeds, size or options.
            UserError: the autoencoder or the weaker model is unreadable.
        """
        options |= {"sampler": sampler, "steps": steps, "guidance_scale": guidance_scale}
        return self.counted(labels, seeds=seeds, size=size, return_latents=return_latents, **options)[0]

    def counted(
        self,
        labels: Labels = None,
        *,
        seeds: Numbers = None,
        size: Size = None,
        return_latents: bool = False,
        **options: Any,
    ) -> tuple[np.ndarray, Int32[np.ndarray, " n"]]:
        """Return what a call returns, and how often networks were evaluated for each image."""
        x, evaluations = self._draw(labels, seeds, options, size)
        return x if return_latents else self.decode(x), evaluations

    def trajectory(
        self,
        labels: Labels = None,
        *,
        seeds: Numbers = None,
        size: Size = None,
        return_latents: bool = False,
        **options: Any,
    ) -> UInt8[np.ndarray, "steps n height width c"] | Float[np.ndarray, "steps n height width c"]:
        """Return the model's prediction of the final images at each step; arguments as in a call."""
        x, _ = self._draw(labels, seeds, options, size, trajectory=True)
        if return_latents:
            return x
        pixels = self.decode(x.reshape(-1, *x.shape[2:]))
        return pixels.reshape(*x.shape[:2], *pixels.shape[1:])

    @property
    def output_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that a call returns by default."""
        height, width, channels = self.components.image_spec.image_shape
        decoder = self.components.autoencoder
        if decoder is None:
            return height, width, channels
        factor = decoder.config.downsampling
        return factor * height, factor * width, decoder.config.out_channels

    @property
    def spans_processes(self) -> bool:
        """Whether it draws on devices of several processes, which must then draw the same images."""
        return self._mesh is not None and self._mesh.is_multi_process

    @property
    def evaluations(self) -> int | None:
        """Network evaluations per image (NFE) with the config's sampling options; None: `counted` tells.

        Raises:
            ConfigError: as `evaluations_by_network`.
        """
        counts = self.evaluations_by_network
        return None if counts is None else sum(counts.values())

    @property
    def evaluations_by_network(self) -> dict[str, int] | None:
        """`evaluations` of the model and, with autoguidance, of the weaker model.

        Raises:
            ConfigError: an invalid sampling option, or one that the process or the model does not support.
        """
        with naming_setting("config.sampling"):
            weak, _ = self._weak(vars(self.components.config.sampling))
            return GenerationSpec.of(self.components, weak=weak).evaluations_by_network

    @property
    def weak_params(self) -> Params | None:
        """Parameters of the weaker model that the config's guidance needs, or None.

        Raises:
            ConfigError: `sampling.weak_model` does not fit the model.
        """
        with naming_setting("config.sampling"):
            return self._weak(vars(self.components.config.sampling))[1]

    def resolve(
        self, labels: Labels, seeds: Numbers
    ) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
        """Return the labels and seeds that a call with these arguments uses.

        Raises:
            ValueError: an unknown class, a label or seed out of range, or numbers that do not match.
        """
        spec = self.components.image_spec
        classes = max(spec.num_classes, 1)
        if labels is not None:
            labels = _integers("label", _indices(labels, spec.class_names), classes)
        if seeds is None:
            seeds = np.arange(1 if labels is None else len(labels))
        seeds = _integers("seed", seeds, 2**31)
        if labels is None:
            labels = seeds % classes
        if len(labels) != len(seeds) and 1 not in (len(labels), len(seeds)):
            raise ValueError(
                f"numbers of labels and seeds differ: got {len(labels)} and {len(seeds)}; expected equal"
                " numbers, or one for all"
            )
        labels, seeds = np.broadcast_arrays(labels, seeds)
        return labels.astype(np.int32), seeds.astype(np.int32)

    def request(self, size: Size = None, *, trajectory: bool = False, **options: Any) -> Request:
        """Return what a call, or `trajectory`, with this size and these options passes to `generate`.

        Raises:
            ValueError: invalid size or options.
            UserError: the weaker model is unreadable.
        """
        height, width, channels = self.components.image_spec.image_shape
        if size is not None:
            height, width = self._model_size(size)
        fields = with_options(self.components.config.sampling, options)
        weak, weak_params = self._weak(fields)
        shape = (height, width, channels)
        spec = GenerationSpec.of(self.components, shape=shape, weak=weak, trajectory=trajectory, **options)
        return Request(spec, weak_params, fields["guidance_scale"])

    def _draw(
        self,
        labels: Labels,
        seeds: Numbers,
        options: dict[str, Any],
        size: Size = None,
        *,
        trajectory: bool = False,
    ) -> tuple[Float[np.ndarray, "*leading n h w c"], Int32[np.ndarray, " n"]]:
        """Return images in the model's space, drawn in batches, and the evaluations of each one.

        `options` are those of `GenerationSpec.of`.
        """
        labels, seeds = self.resolve(labels, seeds)
        request = self.request(size, trajectory=trajectory, **options)
        draw = functools.partial(
            generate,
            self.params,
            scale=jnp.float32(request.scale),
            spec=request.spec,
            weak_params=request.weak_params,
        )
        batch_size = self._batch_size(len(seeds))
        batches = []
        for first in range(0, len(seeds), batch_size):
            # Pad the last batch with the last image, so that only one shape is compiled.
            indices = np.minimum(np.arange(first, first + batch_size), len(seeds) - 1)
            batch = {"labels": labels[indices], "seeds": seeds[indices]}
            with naming_implementation():
                if self._mesh is None:
                    drawn = draw(**batch)
                else:
                    with jax.set_mesh(self._mesh):
                        drawn = draw(**distribute(batch, self._mesh))
            batches.append(jax.tree.map(np.asarray, drawn))
        images, evaluations = zip(*batches, strict=True)
        x = np.concatenate(images, axis=-4)[..., : len(seeds), :, :, :]
        if isinstance(request.spec.sampler, Dopri5) and not np.isfinite(x).all():
            steps = request.spec.sampler.max_steps
            raise ValueError(
                f"dopri5 did not reach its tolerance in max_steps={steps}; expected a larger rtol, atol or"
                " max_steps"
            )
        return x, np.concatenate(evaluations)[: len(seeds)]

    def _weak(self, fields: Mapping[str, Any]) -> tuple[ModelSpec | None, Params | None]:
        """Return the weaker model that these fields of `sampling` need, or (None, None)."""
        path = fields["weak_model"]
        if path is None or not needs_weak_model(fields):
            return None, None
        if path not in self._weak_models:
            self._weak_models[path] = read_frozen_model("weak_model", path, self.components, self._mesh)
        return self._weak_models[path]

    def _model_size(self, size: int | np.integer | tuple[int, int]) -> tuple[int, int]:
        """Return (height, width) in the model's space of images of a size in pixels."""
        factor = decoder.config.downsampling if (decoder := self.components.autoencoder) else 1
        step = factor * self.components.abstract_model.options.size_step
        height, width = (size, size) if isinstance(size, int | np.integer) else size
        if min(height, width) < 1 or height % step or width % step:
            raise ValueError(f"invalid size={size}; expected positive multiples of {step} pixels")
        return int(height) // factor, int(width) // factor

    def decode(self, x: Float[np.ndarray, "n h w c"]) -> UInt8[np.ndarray, "n height width channels"]:
        """Convert images `x` in the model's space to pixels, on all devices of this process."""
        rule = self.components.config.sampling.uint8
        if self._decoder is None:
            return to_pixels(x, rule)
        count, height, width, _ = x.shape
        devices = jax.local_device_count()
        size = devices * min(max(_DECODED_LATENT_PIXELS // (height * width), 1), -(-count // devices))
        decoded, mesh = [], local_mesh()
        with jax.set_mesh(mesh):  # the training mesh may have other devices
            for first in range(0, count, size):
                indices = np.minimum(np.arange(first, first + size), count - 1)
                batch = jax.device_put(x[indices], batch_sharding(mesh))
                decoded.append(np.asarray(to_uint8(self._decoder.decode(batch), rule)))
        return np.concatenate(decoded)[:count]

    @functools.cached_property
    def _decoder(self) -> Autoencoder | None:
        """The autoencoder with its parameters on all devices of this process."""
        autoencoder = self.components.autoencoder
        return autoencoder and autoencoder.on(replicated(local_mesh()))

    def _batch_size(self, count: int) -> int:
        """Return the config's batch size, or less for fewer images, as a multiple of the shards."""
        shards = batch_shards(self._mesh) if self._mesh else 1
        return -(-min(count, self.components.config.sampling.batch_size) // shards) * shards


def load(
    path: str | os.PathLike,
    ema: str | None = None,
    *,
    autoencoder: str | os.PathLike | None = None,
    settings: Config | None = None,
    mesh: Mesh | None = None,
) -> Sampler:
    """Load a sampler from a training run.

    Args:
        path: a workdir (the newest intact checkpoint is used), a checkpoint directory in it, a file or folder
            that --mode=export wrote, or "hf://owner/name", a model of the Hugging Face Hub.
        ema: decay of the average to sample from, such as "0.9999", or "params" for the parameters themselves;
            by default the config's choice.
        autoencoder: folder, file or Hugging Face repository of the autoencoder that decodes latents; by
            default the config's.
        settings: config that replaces the checkpoint's; only fields that may change, such as `sampling`, may
            differ.
        mesh: devices to draw on; by default one device.

    Raises:
        CheckpointError: the checkpoint does not exist or is unreadable.
        ConfigError: `settings` differs in fields that may not change, or its `sampling` is invalid.
    """
    if ema is None and settings is not None:
        ema = settings.sampled_ema
    stored, step, params = read_model(model_path(path), ema)
    if settings is None:
        # The implementation that trained the model may not run on this machine.
        model = dataclasses.replace(stored.config.model, implementation=None)
        settings = dataclasses.replace(stored.config, model=model)
    else:
        check_same(stored.config, settings, path)
    if autoencoder is not None:
        decoder = dataclasses.replace(settings.autoencoder, path=str(autoencoder))
        settings = dataclasses.replace(settings, autoencoder=decoder)
    sampler = Sampler(stored.with_config(settings), params, step=step, mesh=mesh)
    _ = sampler.evaluations  # validate config.sampling before anything is drawn
    return sampler


def _indices(labels: Labels, class_names: Sequence[str]) -> Numbers:
    """Replace names of classes by their indices."""
    if isinstance(labels, str):
        return class_index(labels, class_names)
    if isinstance(labels, Sequence):
        return [class_index(label, class_names) if isinstance(label, str) else label for label in labels]
    return labels


def _integers(name: str, numbers: Numbers, limit: int) -> Int[np.ndarray, " n"]:
    """Return an array of one or more integers from 0 to limit - 1."""
    numbers = np.atleast_1d(np.asarray(numbers))
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer) or not len(numbers):
        raise ValueError(f"invalid {name}s: got {numbers.tolist()}; expected one or more integers")
    wrong = numbers[(numbers < 0) | (numbers >= limit)]
    if wrong.size:
        raise ValueError(f"{name} out of range: got {wrong[0]}; expected 0 … {limit - 1}")
    return numbers


def to_pixels(x: Any, rule: str = "round") -> Any:
    """Map -1 … 1 to 0 … 255, rounded or truncated, and clipped: an array of NumPy or JAX to uint8."""
    xp = x.__array_namespace__()
    pixels = xp.clip((x + 1) * 127.5, 0, 255)
    return (xp.round(pixels) if rule == "round" else xp.floor(pixels)).astype(xp.uint8)
