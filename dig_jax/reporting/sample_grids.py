"""The sample grids of a run: samples.png and, for the report, samples/STEP.png."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from dig_jax.data.class_names import display_name
from dig_jax.reporting.grids import save_grid, save_small_grid
from dig_jax.reporting.loss_curve import save_loss_curve

if TYPE_CHECKING:
    from dig_jax.sampling.sampler import Sampler

log = logging.getLogger(__name__)

# Only the first classes have a row in the grid.
_MAX_ROWS = 10


def draw_samples(sampler: "Sampler", workdir: Path) -> None:
    """Write samples.png, a smaller copy samples/STEP.png, and loss.png if losses were logged.

    There is no grid if the images are neither grayscale nor RGB, such as latents without an autoencoder.
    """
    if sampler.output_shape[2] in (1, 3):
        images, options = grid_of_samples(sampler)
        save_grid(workdir / "samples.png", images, **options)
        (workdir / "samples").mkdir(exist_ok=True)
        save_small_grid(workdir / "samples" / f"{sampler.step}.png", images, **options)
    try:
        save_loss_curve(workdir / "loss.png", workdir / "metrics.jsonl")
    except ValueError as error:
        log.warning("could not write loss.png: %s", error)


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
