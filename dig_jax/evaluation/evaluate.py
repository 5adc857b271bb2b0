"""--mode=evaluate: score a model or a set of images, and show samples next to the nearest training images."""

import contextlib
import datetime
import logging
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from dig_jax.checkpoints.reader import has_checkpoints
from dig_jax.components import Components
from dig_jax.config import Config
from dig_jax.errors import ConfigError, naming_setting
from dig_jax.evaluation.evaluator import Evaluator, Scores, Task
from dig_jax.evaluation.generated import GeneratedImages, provenance
from dig_jax.evaluation.image_sets import open_images
from dig_jax.evaluation.registry import EVALUATORS, evaluators_for
from dig_jax.files.atomic import write_json
from dig_jax.files.paths import Path
from dig_jax.parallel import barrier, local_mesh, on_process_0, one_writer, output_folder
from dig_jax.progress import Progress
from dig_jax.reporting.grids import save_pair_grid
from dig_jax.reporting.html import write_report
from dig_jax.reporting.pictures import warning_of_failure
from dig_jax.reporting.sample_grids import draw_samples, grid_of_samples
from dig_jax.sampling.sampler import Sampler, load

log = logging.getLogger(__name__)

# Images of a folder or file that are read at once.
_PART = 256


def evaluate(settings: Config, workdir: Path, output: Path | None = None) -> Scores:
    """Score a model; write scores.json, samples.png, neighbors.png and report.html.

    An interrupted evaluation resumes where it last saved features, every five minutes.

    Args:
        settings: `sampling`, `evaluation` and `autoencoder` may differ from the checkpoint's.
        workdir: a run's directory, of which the newest checkpoint is scored, a checkpoint directory in it, or
            a file of --mode=export.
        output: the folder of the results; by default the workdir.

    Raises:
        UserError: there is no checkpoint, its settings differ, no evaluator applies to the data, or another
            evaluation writes to the folder.
    """
    output = results_folder(workdir, output)
    sampler = load(workdir, settings=settings, mesh=local_mesh())
    with writing_scores(output) as folder:
        scores = score(sampler, folder, resume=output)
        if not scores:
            raise nothing_to_evaluate(settings)
        if jax.process_index() == 0:
            draw_samples(sampler, folder)
            draw_neighbors(sampler, folder)
            write_report(folder)
        barrier("the report is written")
    return scores


def evaluate_images(settings: Config, path: Path, workdir: Path, output: Path | None = None) -> Scores:
    """Score the images of a folder or an npz file, without a model; write scores.json.

    Args:
        settings: `evaluation` names scores and reference. `evaluation.num_images` does not apply.
        path: the folder or file.
        workdir: the folder of the results, without `output`.
        output: the folder of the results; required if the workdir is a run's.

    Raises:
        UserError: invalid images or an invalid reference, no scores are named, the workdir is a run's, or
            another evaluation writes to the folder.
    """
    if output is None and on_process_0(lambda: has_checkpoints(workdir)):
        raise ConfigError(
            f"missing --output: --images would overwrite the scores of the run in {workdir}; expected"
            " --output=DIRECTORY"
        )
    output = results_folder(workdir, output)
    with naming_setting("--images"):
        images = open_images(path)
        count = len(images)
    evaluators = [one for one in EVALUATORS.values() if one.applies_to(settings) and not one.needs_labels]
    if not evaluators:
        raise ConfigError(
            "nothing to evaluate: got config.evaluation.scores=''; expected scores such as fid,kid"
        )
    with writing_scores(output) as folder:
        task = Task(Components(settings), images, count, folder=output)
        scores = _scores(task, evaluators, _PART * jax.process_count())
        scores |= {"images": images.name, "images_hash": images.fingerprint, "time": _now()}
        write_json(folder / "scores.json", scores)
    return scores


@contextlib.contextmanager
def writing_scores(output: Path) -> Iterator[pathlib.Path]:
    """Yield the local folder of the results, to which no other evaluation writes. All processes call this.

    The lock is not the run's, so that a run can be evaluated while it trains.

    Raises:
        UserError: another evaluation holds the lock, or the folder is not writable.
    """
    lock = output / ".evaluate.lock"
    with one_writer(lock, f"the folder of scores {output}"), output_folder(output) as local:
        yield local.folder


def score(sampler: Sampler, folder: pathlib.Path, *, resume: Path | None = None) -> Scores:
    """Score images of seeds 0, 1, …; log a summary and write scores.json.

    Args:
        sampler: what draws the images.
        folder: where scores.json is written.
        resume: where features are kept, so that the same call continues after an interruption; unlike
            `folder`, it may be in object storage. None: nowhere.

    Returns:
        The scores and what they depend on; empty if no evaluator applies.
    """
    settings = sampler.components.config
    evaluators = evaluators_for(settings)
    if not evaluators:
        return {}
    images = GeneratedImages(sampler, settings.evaluation.num_images)
    task = Task(sampler.components, images, images.count, images.labels, resume)
    processes = 1 if sampler.spans_processes else jax.process_count()
    scores = _scores(task, evaluators, settings.sampling.batch_size * processes)
    scores |= provenance(images) | {"time": _now()}
    write_json(folder / "scores.json", scores)
    return scores


def _scores(task: Task, evaluators: Sequence[Evaluator], size: int) -> Scores:
    """Pass the images to all evaluators, `size` at a time on all processes; return and log the scores."""
    accumulators = [evaluator.start(task) for evaluator in evaluators]
    first = min(accumulator.first for accumulator in accumulators)
    if first:
        log.info("resuming: the features of %d of %d images already exist", first, task.count)
    with Progress("image", first=first, total=task.count, every_seconds=10.0) as progress:
        for number, (indices, images) in enumerate(task.images.parts(first, size, task.count), 1):
            for accumulator in accumulators:
                accumulator.add(indices, images)
            progress.show(min(first + number * size, task.count))
    scores: Scores = {}
    for evaluator, accumulator in zip(evaluators, accumulators, strict=True):
        with naming_setting("config.evaluation.num_images"):
            figures = accumulator.scores()
        log.info(evaluator.summary(figures))
        scores |= figures
    return scores


def draw_neighbors(sampler: Sampler, workdir: pathlib.Path) -> None:
    """Write neighbors.png: the images of samples.png, each next to its nearest training image.

    Writes nothing if no evaluator measures distances to the training images.
    """
    evaluators = evaluators_for(sampler.components.config)
    if not evaluators or sampler.output_shape[2] not in (1, 3):
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


def results_folder(workdir: Path, output: Path | None) -> Path:
    """Return the folder of the results, by default the workdir, also for a checkpoint directory in it.

    Raises:
        ConfigError: the default would be a file, or `output` is one.
    """
    if output is not None:
        if output.is_file():
            raise ConfigError(f"invalid --output={output}: got a file; expected a directory for the scores")
        return output
    if workdir.is_file():
        raise ConfigError(f"missing --output: --workdir={workdir} is a file; expected --output=DIRECTORY")
    return workdir.parent.parent if workdir.parent.name == "checkpoints" else workdir


def nothing_to_evaluate(settings: Config) -> ConfigError:
    """Return the error of a config without scores."""
    return ConfigError(
        f"nothing to evaluate: got config.data.name={settings.data.name!r} and"
        f" config.evaluation.num_images={settings.evaluation.num_images}; expected data with an evaluator"
        f" ({', '.join(EVALUATORS)}) or config.evaluation.scores, and at least 1 image"
    )


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
