"""--mode=sample: any number of images in one npz file, drawn by all processes.

An image depends only on its seed and label, so any process can draw any part of a set.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Int

from dig_jax.config import Config
from dig_jax.errors import ConfigError, UserError, naming_setting
from dig_jax.files.paths import Path, is_remote
from dig_jax.parallel import barrier, check_shared_directory, local_mesh, on_process_0, one_writer
from dig_jax.sampling.image_set import ImageSet
from dig_jax.sampling.sampler import Labels, load

log = logging.getLogger(__name__)


def sample(
    settings: Config,
    workdir: Path,
    labels: Callable[[Sequence[str]], Labels] = lambda class_names: None,
    seeds: Int[np.ndarray, " n"] | None = None,
    output: Path | None = None,
) -> None:
    """Draw images from a workdir's newest checkpoint into an npz file and, if possible, a picture.

    The npz file holds `arr_0`, uint8 [N, height, width, C], as ADM's evaluator reads it, `labels`, `seeds`
    and `set`, a JSON text of what the images depend on. The picture, FILE.png, is written only for grayscale
    and RGB images. If a run was interrupted, the same call draws only the missing images; if the file holds
    the set already, it draws nothing.

    Args:
        settings: `sampling` and `autoencoder` may differ from the checkpoint's; most other fields may not.
        workdir: the run's directory, or a file of --mode=export.
        labels: a function of the class names that returns the `labels` for `Sampler.__call__`.
        seeds: as in `Sampler.__call__`. Without labels and seeds, one image of each class is drawn.
        output: FILE.npz; by default WORKDIR/generated.npz.

    Raises:
        UserError: no checkpoint, settings that differ, invalid labels or seeds, or an output that holds or
            has begun with a different set of images.
    """
    output = _output(workdir, output)
    sampler = load(workdir, settings=settings, mesh=local_mesh())
    names = sampler.components.image_spec.class_names
    chosen = labels(names)
    if chosen is None and seeds is None:
        seeds = np.arange(max(len(names), 1))
    with naming_setting("--labels or --seeds"):
        indices, seeds = sampler.resolve(chosen, seeds)
    images = ImageSet(output, sampler, indices, seeds)
    if on_process_0(lambda: images.is_complete() and not images.folder.exists()):
        log.info("%s already holds these %d images; nothing was drawn", output, len(seeds))
        return
    on_process_0(lambda: _check_writable(output))
    with one_writer(output.with_name(f".{output.name}.lock"), f"the set of images {output}"):
        if on_process_0(images.is_complete):  # by a run that ended meanwhile, or before it deleted its chunks
            on_process_0(images.delete)
            log.info("%s already holds these %d images; nothing was drawn", output, len(seeds))
            return
        on_process_0(images.claim)
        check_shared_directory(images.folder)
        options = settings.sampling
        if counts := sampler.evaluations_by_network:
            text = evaluations_text(counts)
            log.info("drawing with %s, %d steps: %s", options.sampler, options.steps, text)
        evaluations = images.draw(index=jax.process_index(), count=jax.process_count())
        if counts is None and len(evaluations):
            log.info("drawn with %s: %s", options.sampler, counted_text(evaluations))
        barrier("images are drawn")
        on_process_0(lambda: images.collect(names))
    log.info("wrote %d images of step %d to %s", len(seeds), sampler.step, output)


def evaluations_text(counts: Mapping[str, int]) -> str:
    """Return "N network evaluations per image", with the number of each network if there are several."""
    total = f"{sum(counts.values())} network evaluations per image"
    parts = ", ".join(f"{count} of the {name}" for name, count in counts.items())
    return f"{total} ({parts})" if len(counts) > 1 else total


def counted_text(evaluations: Int[np.ndarray, " n"]) -> str:
    """Return "N network evaluations per image (LEAST to GREATEST)"."""
    mean, least, greatest = evaluations.mean(), evaluations.min(), evaluations.max()
    return f"{mean:.1f} network evaluations per image ({least} to {greatest})"


def _output(workdir: Path, output: Path | None) -> Path:
    if output is None:
        if workdir.is_file():
            raise ConfigError(f"missing --output: --workdir={workdir} is a file; expected --output=FILE.npz")
        return workdir / "generated.npz"
    if output.suffix != ".npz":
        raise ConfigError(f"invalid --output={output}; expected a name that ends with .npz")
    return output


def _check_writable(output: Path) -> None:
    folder = output.parent
    if not is_remote(folder) and folder.exists() and not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}; choose another place with --output=FILE.npz")
