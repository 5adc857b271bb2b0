"""What a run shows: sample grids, nearest training images, the loss curve and the scores."""

import datetime
import logging
from pathlib import Path
from typing import Any

import numpy as np

from dig_jax.config import Config
from dig_jax.data.class_names import display_name
from dig_jax.errors import ConfigError, naming_setting
from dig_jax.files.atomic import write_json
from dig_jax.reporting.grids import save_grid, save_pair_grid, save_small_grid
from dig_jax.reporting.html import write_report
from dig_jax.reporting.loss_curve import save_loss_curve
from dig_jax.sampling.sampler import Sampler, load

log = logging.getLogger(__name__)

# Rows of a grid: more classes than these would not be looked at.
_ROWS = 10


def draw_samples(sampler: Sampler, workdir: Path) -> None:
    """Writes samples.png: a row per class, for the first ten, and loss.png, where there are losses to draw.

    The grid is also kept, small, as samples/STEP.png.
    Images that are neither grey nor RGB, such as latents without an autoencoder, make no picture.
    """
    if _drawable(sampler):
        labels, seeds = _grid(sampler)
        images, options = sampler(labels, seeds=seeds), _grid_options(sampler)
        save_grid(workdir / "samples.png", images, **options)
        (workdir / "samples").mkdir(exist_ok=True)
        save_small_grid(workdir / "samples" / f"{sampler.step}.png", images, **options)
    try:
        save_loss_curve(workdir / "loss.png", workdir / "metrics.jsonl")
    except ValueError as error:
        log.warning("there is no loss curve: %s", error)


def draw_neighbours(sampler: Sampler, workdir: Path) -> None:
    """Writes neighbours.png: the images of samples.png, each beside the training image nearest to it."""
    from dig_jax.evaluation import nearest_training_images

    source = sampler.components.train_source
    labels, seeds = _grid(sampler)
    images = sampler(labels, seeds=seeds)
    nearest, _ = nearest_training_images(images)
    neighbours = np.stack([source[int(index)]["image"] for index in nearest])
    save_pair_grid(workdir / "neighbours.png", images, neighbours, **_grid_options(sampler))


def score(sampler: Sampler, workdir: Path) -> dict[str, Any]:
    """Scores images of seeds 0, 1, … with equal shares of the classes, and writes scores.json.

    Returns:
        The scores and what they depend on; empty where there is no score for the data.
    """
    settings = sampler.components.config
    if settings.data.name != "digits" or not settings.evaluation.num_images:
        return {}
    from dig_jax.evaluation import score_digits

    labels, seeds = sampler.resolve(None, np.arange(settings.evaluation.num_images))
    images = sampler(labels, seeds=seeds)
    with naming_setting("config.evaluation.num_images"):
        scores = score_digits(images, labels)
    s = settings.sampling
    scores |= {
        "step": sampler.step,
        "ema": settings.sampled_ema,
        "sampler": s.sampler,
        "sampling_steps": s.steps,
        "guidance_scale": s.guidance_scale,
        "seeds": f"0…{len(seeds) - 1}",
        "labels": "seed modulo the number of classes",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(workdir / "scores.json", scores)
    return scores


def evaluate(settings: Config, workdir: Path) -> dict[str, Any]:
    """Scores a workdir's newest checkpoint again: samples.png, neighbours.png, scores.json, report.html.

    Raises:
        UserError: no checkpoint, other settings, or data without a score.
    """
    sampler = load(workdir, settings=settings)
    scores = score(sampler, workdir)
    if not scores:
        raise ConfigError(
            "there is no score: it takes config.data.name='digits' and config.evaluation.num_images above 0,"
            f" but they are {settings.data.name!r} and {settings.evaluation.num_images}"
        )
    draw_samples(sampler, workdir)
    draw_neighbours(sampler, workdir)
    write_report(workdir)
    log.info(summary(scores))
    return scores


def summary(scores: dict[str, Any]) -> str:
    """The scores in one line for people."""
    return (
        f"accuracy {scores['accuracy']:.1%} of {scores['num_images']} generated digits"
        f" (classifier on real ones: {scores['classifier_heldout_accuracy']:.1%}),"
        f" Fréchet distance {scores['frechet_distance']:.3f}"
        f" (real training images: {scores['frechet_distance_real']:.3f},"
        f" ratio {scores['frechet_distance'] / scores['frechet_distance_real']:.2f})"
    )


def _drawable(sampler: Sampler) -> bool:
    return sampler.picture_shape[2] in (1, 3)


def _grid(sampler: Sampler) -> tuple[np.ndarray, np.ndarray]:
    """Labels and seeds of the grid: the same images as the first ones that are scored."""
    classes = max(sampler.components.image_spec.num_classes, 1)
    rows, columns = min(classes, _ROWS), sampler.components.config.sampling.images_per_class
    seeds = np.arange(rows)[:, None] + classes * np.arange(columns)
    return (seeds % classes).reshape(-1), seeds.reshape(-1)


def _grid_options(sampler: Sampler) -> dict[str, Any]:
    names = tuple(map(display_name, sampler.components.image_spec.class_names[:_ROWS]))
    return {"columns": sampler.components.config.sampling.images_per_class, "row_labels": names}
