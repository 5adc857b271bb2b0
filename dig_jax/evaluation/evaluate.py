"""--mode=evaluate: score a checkpoint, and show each sample next to the nearest training image."""

import datetime
import logging
import pathlib

import numpy as np

from dig_jax.config import Config
from dig_jax.errors import ConfigError, naming_setting
from dig_jax.evaluation.evaluator import Scores
from dig_jax.evaluation.registry import EVALUATORS, evaluators_for
from dig_jax.files.atomic import write_json
from dig_jax.files.mirror import mirror
from dig_jax.files.paths import Path
from dig_jax.reporting.grids import save_pair_grid
from dig_jax.reporting.html import write_report
from dig_jax.reporting.pictures import warning_of_failure
from dig_jax.reporting.sample_grids import draw_samples, grid_of_samples
from dig_jax.sampling.sampler import Sampler, load

log = logging.getLogger(__name__)


def evaluate(settings: Config, workdir: Path) -> Scores:
    """Score a workdir's newest checkpoint; write scores.json, samples.png, neighbors.png and report.html.

    Raises:
        UserError: there is no checkpoint, its settings differ, or no evaluator applies to the data.
    """
    if workdir.is_file():
        raise ConfigError(f"invalid --workdir={workdir}: got a file; expected a directory for the scores")
    sampler = load(workdir, settings=settings)
    with mirror(workdir) as output:
        scores = score(sampler, output.folder)
        if not scores:
            raise ConfigError(
                f"nothing to evaluate: got config.data.name={settings.data.name!r} and"
                f" config.evaluation.num_images={settings.evaluation.num_images}; expected data with an"
                f" evaluator ({', '.join(EVALUATORS)}) and at least 1 image"
            )
        draw_samples(sampler, output.folder)
        draw_neighbors(sampler, output.folder)
        write_report(output.folder)
    return scores


def score(sampler: Sampler, workdir: pathlib.Path) -> Scores:
    """Score images of seeds 0, 1, …, with equal shares of the classes; log a summary and write scores.json.

    Returns:
        The scores and the settings that they depend on; empty if no evaluator applies.
    """
    settings = sampler.components.config
    evaluators = evaluators_for(settings)
    if not evaluators:
        return {}
    labels, seeds = sampler.resolve(None, np.arange(settings.evaluation.num_images))
    images, counted = sampler.counted(labels, seeds=seeds)
    evaluations = sampler.evaluations
    scores: Scores = {}
    for evaluator in evaluators:
        with naming_setting("config.evaluation.num_images"):
            figures = evaluator.score(images, labels, sampler.components)
        log.info(evaluator.summary(figures))
        scores |= figures
    s = settings.sampling
    scores |= {
        "step": sampler.step,
        "ema": settings.sampled_ema,
        "sampler": s.sampler,
        "sampling_steps": None if evaluations is None else s.steps,
        "network_evaluations_per_image": float(counted.mean()) if evaluations is None else evaluations,
        "guidance": s.guidance,
        "guidance_scale": s.guidance_scale,
        "internal_guidance_scale": s.internal_guidance_scale,
        "seeds": f"0…{len(seeds) - 1}",
        "labels": "seed modulo the number of classes",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    write_json(workdir / "scores.json", scores)
    return scores


def draw_neighbors(sampler: Sampler, workdir: pathlib.Path) -> None:
    """Write neighbors.png: the images of samples.png, each next to its nearest training image.

    Writes nothing if no evaluator measures distances to the training images.
    """
    evaluators = evaluators_for(sampler.components.config)
    if not evaluators:
        return
    images, options = grid_of_samples(sampler)
    for evaluator in evaluators:
        nearest = evaluator.nearest_training_images(images)
        if nearest is not None:
            source = sampler.components.train_source
            neighbors = np.stack([source[int(index)]["image"] for index in nearest])
            with warning_of_failure(workdir / "neighbors.png"):
                save_pair_grid(workdir / "neighbors.png", images, neighbors, **options)
            return
