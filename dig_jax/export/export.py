"""The export command: a run's parameters, or its sampler as a program, in one file."""

import logging
import pathlib
import tempfile
from collections.abc import Callable

import jax
import numpy as np

from dig_jax.checkpoints.parameter_file import write_parameter_file, writing_to
from dig_jax.checkpoints.reader import holds, read_model
from dig_jax.components import Components, Params
from dig_jax.config import Config, check_same
from dig_jax.errors import ConfigError, alternatives
from dig_jax.export.model_folder import CARD, write_model_folder
from dig_jax.files.atomic import new_folder, replacing
from dig_jax.files.hub import repository_of, upload
from dig_jax.files.paths import Path
from dig_jax.sampling.sampler import load

log = logging.getLogger(__name__)


def export(settings: Config, workdir: Path, output: Path, license: str | None = None) -> None:
    """Write a trained model in the format that the suffix of `output` names.

    The parameters are those of `sampling.ema`. A program samples with the options of `sampling`.

    Args:
        settings: the config to store; fields that may not change must equal the workdir's.
        workdir: the run's directory, whose newest intact checkpoint is taken, or a file or folder that
            --mode=export or the converter wrote.
        output: FILE.safetensors for the parameters, FILE.stablehlo or FILE.onnx for the sampler, or a name
            without a suffix for a folder with parameters and a model card. It must not exist, or hold exactly
            this: then nothing is written.
        license: license of the parameters for the model card, as the Hugging Face Hub names it.

    Raises:
        ConfigError: an invalid or existing `output`, or settings that differ from the workdir's.
        CheckpointError: no readable model, or `output` could not be written.
    """
    if not output.suffix:
        _export_folder(settings, workdir, output, license)
        return
    _check_no_license(license, output)
    if output.suffix not in WRITERS:
        raise ConfigError(
            f"invalid --output={output}; expected a name that ends with {alternatives(tuple(WRITERS))}, or a"
            " name without a suffix"
        )
    WRITERS[output.suffix](settings, workdir, output)


def _export_parameters(settings: Config, workdir: Path, output: Path) -> None:
    components, step, params = _read(settings, workdir)
    if output.exists():
        _check_same_content(output, holds(output, components, step, params))
        log.info("%s already holds step %d (%s)", output, step, settings.sampled_ema)
        return
    write_parameter_file(output, components, step, params)
    count = len(jax.tree.leaves(params))
    log.info("exported step %d (%s, %d arrays) to %s", step, settings.sampled_ema, count, output)


def _export_folder(settings: Config, workdir: Path, output: Path, license: str | None) -> None:
    components, step, params = _read(settings, workdir)
    if output.exists():
        _check_same_content(output, holds(output, components, step, params))
        log.info("%s already holds step %d (%s)", output, step, settings.sampled_ema)
        return
    with writing_to(output), new_folder(output) as folder:
        write_model_folder(folder, output.name, components, step, params, workdir, license)
    log.info("exported step %d (%s) with a model card to %s", step, settings.sampled_ema, output)


def push(settings: Config, workdir: Path, url: str, license: str | None = None) -> None:
    """Upload a trained model with a model card to the Hugging Face Hub, as one commit.

    A new repository is created. A card that is there is kept.

    Args:
        settings, workdir, license: as in `export`.
        url: hf://owner/name.

    Raises:
        ConfigError: settings that differ from the workdir's.
        CheckpointError: an invalid `url`, no readable model, or the upload failed.
    """
    repository = repository_of(url)
    components, step, params = _read(settings, workdir)
    with tempfile.TemporaryDirectory() as text:
        folder = pathlib.Path(text)
        write_model_folder(folder, url, components, step, params, workdir, license)
        address = upload(repository, folder, f"Step {step} ({settings.sampled_ema})", CARD)
    log.info("exported step %d (%s) with a model card to %s", step, settings.sampled_ema, address)


def _read(settings: Config, workdir: Path) -> tuple[Components, int, Params]:
    stored, step, params = read_model(workdir, settings.sampled_ema)
    check_same(stored.config, settings, workdir)
    return stored.with_config(settings), step, params


def _check_no_license(license: str | None, output: Path) -> None:
    if license is not None:
        raise ConfigError(
            f"unsupported --license={license} of --output={output}; expected a folder or hf://OWNER/NAME,"
            " which have a model card"
        )


def _export_stablehlo(settings: Config, workdir: Path, output: Path) -> None:
    from dig_jax.export.stablehlo import PLATFORMS, entries, holds_entries

    sampler = load(workdir, settings=settings)
    content = entries(sampler)
    if output.exists():
        _check_same_content(output, holds_entries(output, content))
        log.info("%s already holds the sampler of step %d (%s)", output, sampler.step, settings.sampled_ema)
        return
    with writing_to(output), replacing(output) as file:
        np.savez(file, allow_pickle=False, **content)
    log.info(
        "exported the sampler of step %d (%s) for %s to %s",
        sampler.step,
        settings.sampled_ema,
        ", ".join(PLATFORMS),
        output,
    )


def _export_onnx(settings: Config, workdir: Path, output: Path) -> None:
    from dig_jax.export.onnx import onnx_model

    sampler = load(workdir, settings=settings)
    content = onnx_model(sampler)
    if output.exists():
        _check_same_content(output, output.read_bytes() == content)
        log.info("%s already holds the sampler of step %d (%s)", output, sampler.step, settings.sampled_ema)
        return
    with writing_to(output), replacing(output) as file:
        file.write(content)
    log.info("exported the sampler of step %d (%s) to %s", sampler.step, settings.sampled_ema, output)


def _check_same_content(output: Path, same: bool) -> None:
    if not same:
        raise ConfigError(f"--output={output} exists and holds something else; choose another name")


WRITERS: dict[str, Callable[[Config, Path, Path], None]] = {
    ".safetensors": _export_parameters,
    ".stablehlo": _export_stablehlo,
    ".onnx": _export_onnx,
}
