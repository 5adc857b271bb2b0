"""One jitted function from parameters, labels and seeds to images, and the static values it depends on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dig_jax.components import Components, ModelSpec, Params
from dig_jax.diffusion import BaseSampler, Process, classifier_free, make_sampler
from dig_jax.parallel import constrain


@dataclasses.dataclass(frozen=True)
class GenerationSpec:
    """The static values of `generate`: they compare and hash by value and can be pickled.

    Equal specs share one compiled program, and an exporter can store the spec with the program.

    Attributes:
        model: the network.
        process: the diffusion process that the network was trained on.
        sampler: the sampler with its options.
        shape: (height, width, channels) of an image in the model's space.
        guided: use classifier-free guidance, which doubles the cost of a step.
        guidance_channels: guide only this many channels, or None for all; see `classifier_free`.
        trajectory: return the images predicted at every step instead of the final images.
    """

    model: ModelSpec
    process: Process
    sampler: BaseSampler
    shape: tuple[int, int, int]
    guided: bool
    guidance_channels: int | None
    trajectory: bool = False

    @property
    def evaluations(self) -> int:
        """How often the network is evaluated for one image (NFE); a guided step evaluates it twice."""
        return (1 + self.guided) * self.sampler.evaluations(self.process)

    @classmethod
    def of(
        cls,
        components: Components,
        *,
        guided: bool,
        shape: tuple[int, int, int] | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        trajectory: bool = False,
    ) -> "GenerationSpec":
        """Return the spec that a config's `sampling` describes, with the given values replaced.

        Models without classes are never guided.
        """
        settings = components.config.sampling
        return cls(
            model=components.model_spec,
            process=components.diffusion,
            sampler=make_sampler(
                settings.sampler if sampler is None else sampler,
                steps=settings.steps if steps is None else steps,
                clip=settings.clip,
            ),
            shape=shape or components.image_spec.image_shape,
            guided=guided and components.image_spec.num_classes > 0,
            guidance_channels=settings.guidance_channels,
            trajectory=trajectory,
        )


@functools.partial(jax.jit, static_argnames="spec")
def generate(
    params: Params,
    *,
    labels: Int[Array, " b"],
    seeds: Int[Array, " b"],
    scale: Float[Array, ""],
    spec: GenerationSpec,
) -> Float[Array, "*images"]:
    """Return images in the model's space: [B, H, W, C], or [steps, B, H, W, C] for a trajectory."""
    denoiser = classifier_free(
        functools.partial(spec.model.denoise, params),
        labels,
        spec.model.num_classes,
        scale if spec.guided else 1,
        channels=spec.guidance_channels,
    )
    start = noise(seeds, jnp.int32(0), spec.shape)

    def step_noise(step: Int[Array, ""]) -> Float[Array, "b h w c"]:
        return noise(seeds, step + 1, spec.shape)

    if spec.trajectory:
        _, images = spec.sampler(spec.process, denoiser, start, step_noise, return_trajectory=True)
    else:
        images = spec.sampler(spec.process, denoiser, start, step_noise)
    # Replicated, so that every process can read all images.
    return constrain(images)


def noise(
    seeds: Int[Array, " b"], number: Int[Array, ""], shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
    """Return standard normal noise from each image's seed; number 0 is the start, i + 1 is for step i."""
    key = jax.random.key(0)

    def draw(seed: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, seed), number), shape)

    return jax.vmap(draw)(seeds)
