"""What a run shows: sample grids, nearest training images, the loss curve and the scores."""

import datetime
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from dig_jax.config import Config
from dig_jax.errors import ConfigError, blaming
from dig_jax.files import replacing
from dig_jax.pictures import save_grid, save_loss_curve, save_pair_grid, save_small_grid
from dig_jax.run_page import write_report
from dig_jax.sampling import Sampler, load

log = logging.getLogger(__name__)

# Rows of a grid: more classes than these would not be looked at.
_ROWS = 10


def draw_samples(sampler: Sampler, workdir: Path) -> None:
    """Writes samples.png: a row per class, for the first ten, and loss.png, where there are losses to draw.

    The grid is also kept, small, as samples/STEP.png.
    Images that are neither grey nor RGB, such as latents, make no picture.
    """
    if _drawable(sampler):
        labels, seeds = _grid(sampler)
        images, options = sampler(labels, seeds=seeds), _grid_options(sampler)
        save_grid(workdir / "samples.png", images, **options)
        (workdir / "samples").mkdir(exist_ok=True)
        save_small_grid(workdir / "samples" / f"{sampler.step}.png", images, **options)
    try:
        save_loss_curve(workdir / "loss.png", workdir / "metrics.jsonl")
    except (ValueError, FileNotFoundError) as error:
        log.warning("there is no loss curve: %s", error)


def draw_neighbours(sampler: Sampler, workdir: Path) -> None:
    """Writes neighbours.png: the images of samples.png, each beside the training image nearest to it."""
    from dig_jax.evaluation import nearest_training_images

    source = sampler.experiment.train_source
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
    settings, source = sampler.experiment.config, sampler.experiment.train_source
    if source.name != "digits" or not settings.evaluation.num_images:
        return {}
    from dig_jax.evaluation import score_digits

    labels, seeds = sampler.resolve(None, np.arange(settings.evaluation.num_images))
    images = sampler(labels, seeds=seeds)
    with blaming("config.evaluation.num_images"):
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


def sample(
    settings: Config, workdir: Path, labels: np.ndarray | None = None, seeds: np.ndarray | None = None
) -> None:
    """Draws images from a workdir's newest checkpoint into generated.npz and, if grey or RGB, generated.png.

    The npz holds `arr_0`, uint8 [N, height, width, C], as evaluators of the field read it, and beside it
    `labels` and `seeds`.

    Args:
        settings: its `sampling` decides how; the rest must be what the workdir began with.
        labels, seeds: as in a call of `Sampler`; neither: one image of each class.

    Raises:
        UserError: no checkpoint, other settings, or labels or seeds that cannot be.
    """
    sampler = load(workdir, settings=settings)
    if labels is None and seeds is None:
        seeds = np.arange(max(sampler.experiment.train_source.num_classes, 1))
    with blaming("--labels, --seeds or config.sampling"):
        labels, seeds = sampler.resolve(labels, seeds)
        images = sampler(labels, seeds=seeds)
    np.savez(workdir / "generated.npz", arr_0=images, labels=labels, seeds=seeds)
    if _drawable(sampler):
        names = sampler.experiment.train_source.class_names
        titles = [names[label] for label in labels] if names else ()
        columns = min(len(images), settings.sampling.images_per_class)
        save_grid(workdir / "generated.png", images, columns=columns, titles=titles)
    log.info("%d images of step %d are in %s", len(images), sampler.step, workdir / "generated.npz")


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


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def _drawable(sampler: Sampler) -> bool:
    return sampler.experiment.train_source.image_shape[2] in (1, 3)


def _grid(sampler: Sampler) -> tuple[np.ndarray, np.ndarray]:
    """Labels and seeds of the grid: the same images as the first ones that are scored."""
    classes = max(sampler.experiment.train_source.num_classes, 1)
    rows, columns = min(classes, _ROWS), sampler.experiment.config.sampling.images_per_class
    seeds = np.arange(rows)[:, None] + classes * np.arange(columns)
    return (seeds % classes).reshape(-1), seeds.reshape(-1)


def _grid_options(sampler: Sampler) -> dict[str, Any]:
    names = sampler.experiment.train_source.class_names[:_ROWS]
    return {"columns": sampler.experiment.config.sampling.images_per_class, "row_labels": names}
