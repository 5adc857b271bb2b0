"""The sample grids of a run: samples.png and, for the report, samples/STEP.png."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from dig_jax.data.class_names import display_name
from dig_jax.reporting.grids import save_grid, save_small_grid
from dig_jax.reporting.loss_curve import save_loss_curve
from dig_jax.reporting.pictures import warning_of_failure

if TYPE_CHECKING:
    from dig_jax.sampling.sampler import Sampler

log = logging.getLogger(__name__)

# Only the first classes have a row in the grid.
_MAX_ROWS = 10


def draw_samples(sampler: "Sampler", workdir: Path) -> None:
    """Write samples.png, a smaller copy samples/STEP.png, and loss.png if losses were logged.

    There is no grid if the images are neither grayscale nor RGB, such as latents without an autoencoder. A
    picture that cannot be written is a warning.
    """
    if sampler.output_shape[2] in (1, 3):
        images, options = grid_of_samples(sampler)
        with warning_of_failure(workdir / "samples.png"):
            save_grid(workdir / "samples.png", images, **options)
        small = workdir / "samples" / f"{sampler.step}.png"
        with warning_of_failure(small):
            small.parent.mkdir(exist_ok=True)
            save_small_grid(small, images, **options)
    with warning_of_failure(workdir / "loss.png"):
        save_loss_curve(workdir / "loss.png", workdir / "metrics.jsonl")


def grid_of_samples(
    sampler: "Sampler",
) -> tuple[UInt8[np.ndarray, "n height width channels"], dict[str, Any]]:
    """Return the images of the grid, one row per class, and the options for `save_grid`.

    They are the first images that `evaluation.evaluate.score` scores.
    """
    spec, columns = sampler.components.image_spec, sampler.components.config.sampling.images_per_class
    classes = max(spec.num_classes, 1)
    rows = min(classes, _MAX_ROWS)
    seeds = (np.arange(rows)[:, None] + classes * np.arange(columns)).reshape(-1)
    row_labels = tuple(map(display_name, spec.class_names[:_MAX_ROWS]))
    return sampler(seeds % classes, seeds=seeds), {"columns": columns, "row_labels": row_labels}
