"""The images that a model generates, as a set to score, and what they depend on."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from dig_jax.config import Config, to_dict
from dig_jax.errors import UserError, naming_setting
from dig_jax.evaluation.image_sets import Images, Part, Shape
from dig_jax.parallel import gather_arrays, own_share
from dig_jax.sampling.generation_spec import OPTIONS
from dig_jax.sampling.image_set import ImageSet
from dig_jax.sampling.sampler import Sampler


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedImages(Images):
    """Images of seeds 0, 1, … that are drawn when they are read.

    Attributes:
        sampler: what draws them.
        count: number of images.
        evaluations: how often networks were evaluated for each image that was drawn.
    """

    sampler: Sampler
    count: int
    evaluations: list[int] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        """What they are."""
        return "generated images"

    @property
    def shape(self) -> Shape:
        """(height, width, channels)."""
        return self.sampler.output_shape

    @functools.cached_property
    def labels(self) -> Int[np.ndarray, " n"]:
        """The class that each image is generated for, by `config.evaluation.labels`."""
        settings, spec = self.sampler.components.config, self.sampler.components.image_spec
        classes = max(spec.num_classes, 1)
        if settings.evaluation.labels == "random":
            return np.random.default_rng(0).integers(classes, size=self.count)
        return np.arange(self.count) % classes

    @functools.cached_property
    def dependencies(self) -> dict[str, Any]:
        """Everything that the images depend on, as JSON values."""
        return ImageSet(pathlib.Path("none.npz"), self.sampler, self.labels, np.arange(self.count)).identity

    @property
    def fingerprint(self) -> str:
        """Hash of `dependencies`."""
        return hashlib.sha256(json.dumps(self.dependencies, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def parts(self, first: int, size: int, stop: int) -> Iterator[Part]:
        """Draw images first … stop - 1, `size` at a time.

        Raises:
            UserError: an image is not finite.
        """
        for start in range(first, stop, size):
            own = np.array(own_share(start, min(start + size, stop)), int)
            # The devices of all processes may draw together; then each takes its share.
            seeds = np.arange(start, min(start + size, stop)) if self.sampler.spans_processes else own
            if not len(seeds):
                yield own, np.zeros((0, *self.shape), np.uint8)
                continue
            with naming_setting("config.sampling"):
                x, counted = self.sampler.counted(self.labels[seeds], seeds=seeds, return_latents=True)
            self.evaluations.extend(counted.tolist())
            bad = ~np.isfinite(x).reshape(len(x), -1).all(1)
            if bad.any():
                raise UserError(
                    f"the image of seed {seeds[bad][0]} is not finite: got NaN or infinity from step"
                    f" {self.sampler.step}; expected a model that has not diverged, such as an older one in"
                    " WORKDIR/checkpoints"
                )
            x = x[own - seeds[0]]
            yield own, self.sampler.decode(x) if len(x) else np.zeros((0, *self.shape), np.uint8)


def provenance(images: GeneratedImages) -> dict[str, Any]:
    """Return what the scores of generated images depend on, for scores.json. All processes call it."""
    sampler = images.sampler
    settings: Config = sampler.components.config
    s, autoencoder = settings.sampling, sampler.components.autoencoder
    evaluations = sampler.evaluations  # None if it depends on the image
    counted = gather_arrays({"evaluations": np.array(images.evaluations)}) if evaluations is None else []
    labels = {
        "balanced": "seed modulo the number of classes",
        "random": "uniform, drawn from seed 0",
    }
    return {
        "step": sampler.step,
        "ema": settings.sampled_ema,
        **{name: value for name, value in to_dict(s).items() if name in OPTIONS and name != "steps"},
        "sampling_steps": None if evaluations is None else s.steps,
        "network_evaluations_per_image": (
            float(np.mean(np.concatenate([part["evaluations"] for part in counted])))
            if evaluations is None
            else evaluations
        ),
        "guidance_interval": list(s.guidance_interval),
        "seeds": f"0…{images.count - 1}",
        "labels": labels[settings.evaluation.labels],
        "dtype": settings.model.dtype,
        "uint8": s.uint8,
        "parameters_hash": _parameters_hash(images),
        "autoencoder_hash": autoencoder.fingerprint() if autoencoder else "",
    }


def _parameters_hash(images: GeneratedImages) -> str:
    """Return the hash of the parameters' values; empty if processes hold only shards."""
    return "" if images.sampler.spans_processes else images.dependencies["values of the parameters"]
