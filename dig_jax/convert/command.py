"""Convert parameters of the released PyTorch code and of diffusers to ours and back.

python -m dig_jax.convert 0400000.pt dig.safetensors          DiG, DiT, SiT, DiS, or diffusers' DiT
python -m dig_jax.convert 0400000.pt runs/dig --tree=model    the same as a workdir with a checkpoint
python -m dig_jax.convert runs/dig dig.pt                     a workdir or a file of --mode=export
python -m dig_jax.convert runs/dig dig.safetensors            under upstream's names
python -m dig_jax.convert runs/dit transformer                a DiT of ours as a diffusers folder

Targets are written atomically. dig_jax.load and --config.init_from read our formats.
"""

import argparse
import contextlib
import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from flax import traverse_util

from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.checkpoints.parameter_file import FORMAT, write_parameter_file, writing_to
from dig_jax.checkpoints.reader import has_checkpoints, holds, read_model
from dig_jax.components import Components, Params
from dig_jax.convert import diffusers, flow
from dig_jax.convert.names import read_params, torch_arrays
from dig_jax.convert.recognize import (
    EMA,
    images_of,
    looks_like_official_dit,
    recognize,
    with_null_class,
)
from dig_jax.convert.sources import UpstreamParams, open_upstream
from dig_jax.errors import (
    CheckpointError,
    ConfigError,
    InvalidFile,
    PrintableFormatter,
    UserError,
    one_line,
)
from dig_jax.files.atomic import new_folder, replacing, write_json
from dig_jax.files.paths import Path, to_path
from dig_jax.files.pytorch.writer import write_torch
from dig_jax.files.safetensors import open_safetensors, write_safetensors
from dig_jax.files.weights import WEIGHTS_FILE, open_weights, read_json_object

log = logging.getLogger("dig_jax.convert")

CONFIG_FILE = "config.json"


def convert(
    source: str | os.PathLike, target: str | os.PathLike, tree: str | None = None, **options: Any
) -> None:
    """Convert a file; the kind of source decides the direction.

    Args:
        source: a file or folder of upstream's or diffusers' parameters; or ours: a workdir, a checkpoint in
            it, or an exported file.
        target: FILE.safetensors; from upstream also a new workdir, from ours also FILE.pt or a new folder in
            diffusers' layout.
        tree: as in `open_upstream`; for a workdir of ours, the average's decay or "params".
        options: as in `recognize`.

    Raises:
        ConfigError: the target exists and holds something else, or an option is invalid or missing.
        CheckpointError: the source is unreadable or unsupported, or writing failed.
    """
    source, target = to_path(source), to_path(target)
    ours = _is_ours(source)
    suffixes, expected = (
        ((".safetensors", ".pt", ""), "FILE.safetensors, FILE.pt or a new folder for diffusers")
        if ours
        else ((".safetensors", ""), "FILE.safetensors or a new workdir")
    )
    if target.suffix not in suffixes:
        raise ConfigError(f"invalid target {target} for {source}; expected {expected}")
    if not ours:
        _from_upstream(source, target, tree, **options)
    elif any(value is not None for value in options.values()):
        raise ConfigError(f"{source} contains its config; --tree is the only option that applies")
    else:
        _from_ours(source, target, tree)


def _from_upstream(source: Path, target: Path, tree: str | None, **options: Any) -> None:
    with open_upstream(source, tree) as upstream:
        name = options.get("model") or source.name
        try:
            given = flow.time_input(upstream, name)
            settings = flow.as_flow(recognize(upstream, **options), given)
            components = Components(settings, images_of(settings))
            complete = with_null_class(upstream, components.image_spec.num_classes)
            signed = flow.with_our_sign(complete, given)
            params = read_params(components.abstract_model, signed.stored)
        except ConfigError:
            raise
        except InvalidFile:  # open_upstream adds the file's name
            raise
        except (UserError, ValueError) as error:
            raise CheckpointError(f"{source}: {error}") from error
        _log_model(components, upstream.tree, params)
        _log_notes(upstream, complete, components, options.get("num_classes") is not None)
        if given is not None:
            log.info("flow matching: the network gets the time as time_input=%s", given)
        elif looks_like_official_dit(upstream, settings):
            log.warning(
                "these parameters have the names and shapes of the published DiT-XL/2, whose license"
                " (CC-BY-NC) excludes commercial use"
            )
    nested = traverse_util.unflatten_dict(params)
    if target.exists():
        _log_existing(target, holds(target, components, 0, nested))
        return
    if target.suffix:
        # The file does not contain the step.
        write_parameter_file(target, components, 0, nested)
    else:
        _write_workdir(target, components, nested)
    log.info("wrote %s", target)


def _from_ours(source: Path, target: Path, tree: str | None) -> None:
    components, step, params = read_model(source, tree)
    flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}
    model = components.abstract_model
    try:
        about = None if target.suffix else diffusers.config_of(model, components.config.diffusion.process)
        arrays = torch_arrays(model, flat)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    if about is not None:
        arrays = diffusers.from_upstream(arrays, model.blocks.depth)
    if target.exists():
        _log_existing(target, _holds_arrays(target, about, arrays))
        return
    with writing_to(target):
        if target.suffix == ".pt":
            with replacing(target) as file:
                write_torch(file, arrays)
        elif target.suffix:
            write_safetensors(target, arrays, {"format": "pt"})
        else:
            with new_folder(target) as folder:
                write_json(folder / CONFIG_FILE, about)
                write_safetensors(folder / WEIGHTS_FILE, arrays, {"format": "pt"})
    log.info("wrote %s: %d arrays of step %d", target, len(arrays), step)


def _holds_arrays(target: Path, about: dict[str, Any] | None, arrays: Mapping[str, np.ndarray]) -> bool:
    """Return whether a file, or with `about` a folder of diffusers, has exactly these arrays."""
    file = target
    if about is not None:
        file = target / WEIGHTS_FILE
        if read_json_object(target / CONFIG_FILE) != about:
            return False
    try:
        with open_weights(file) as weights:
            found = weights.below("")
            return found.keys() == arrays.keys() and all(
                np.array_equal(found[name].read(), array) for name, array in arrays.items()
            )
    except (CheckpointError, InvalidFile):
        return False


def _log_existing(target: Path, is_same: bool) -> None:
    if not is_same:
        raise ConfigError(f"{target} exists and holds something else; choose another name")
    log.info("%s already holds this; nothing was written", target)


def _is_ours(source: Path) -> bool:
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or folder")
    if source.is_dir():
        return has_checkpoints(source)
    # The reader reports an invalid file.
    with contextlib.suppress(CheckpointError), open_safetensors(source) as file:
        return file.metadata.get("format") == FORMAT
    return False


def _log_model(components: Components, tree: str, params: Mapping[tuple, np.ndarray]) -> None:
    model, images = components.config.model, components.image_spec
    options = (
        ""
        if components.abstract_model.family == "DiS"
        else (
            f"; conv={model.conv or 'none'}, norm={model.norm}, skip={model.skip or 'none'},"
            f" directions={model.directions}"
        )
    )
    log.info(
        "%s, %s parameters%s: %s × %s px, %s channels, %s classes%s",
        model.name,
        f"{sum(leaf.size for leaf in params.values()):,}",
        f" of tree {tree!r}" if tree else "",
        *images.image_shape,
        images.num_classes,
        options,
    )


def _log_notes(
    upstream: UpstreamParams, complete: UpstreamParams, components: Components, classes_given: bool
) -> None:
    """Tell what was assumed or changed."""
    classes = components.image_spec.num_classes
    if complete is not upstream:
        log.info(
            "the label table has no null class: added the mean of the %d classes as one; guidance is off"
            " (sampling.guidance_scale=1), because the model was not trained with it",
            classes,
        )
    elif classes not in (0, 1000) and not classes_given:
        log.info(
            "the last of the %d rows of the label table is taken for the null class; if it is a class, use"
            " --num_classes=%d",
            classes + 1,
            classes + 1,
        )
    rounded = sum(array.dtype == "float64" for array in upstream.stored.values())
    if rounded:
        log.info("rounded %d float64 arrays to float32", rounded)


def _write_workdir(target: Path, components: Components, params: Params) -> None:
    """Write a checkpoint with equal parameters and average, and without optimizer state."""
    state = {"step": np.int32(0), "params": params, "ema": {EMA: params}}
    with writing_to(target), new_folder(target) as folder:
        with Checkpoints(folder, components.config.checkpoint) as checkpoints:
            data = {"examples": 0} | components.image_spec.to_dict()
            checkpoints.save(0, state, data, components.config)
        write_json(folder / CONFIG_FILE, config_and_versions(components.config))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _size(text: str) -> int | tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})(?:[x×](\d{1,6}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"invalid size {text!r}; expected a number or HEIGHTxWIDTH")
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dig_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        help="file or folder to convert: upstream's, diffusers', or a workdir or exported file of ours",
    )
    parser.add_argument(
        "target", help="FILE.safetensors, FILE.pt, a new workdir or a new folder for diffusers"
    )
    parser.add_argument(
        "--tree",
        help="what stands before the model's names in a file (ema, model, state_dict.module, …); for a run of"
        " ours, the average's decay or params",
    )
    parser.add_argument("--model", help="model name such as DiG-XL/2 (default: from the shapes)")
    parser.add_argument(
        "--input_size",
        type=_size,
        help="height and width of the images or latents, such as 32 or 32x64 (default: from the positions)",
    )
    parser.add_argument(
        "--num_classes",
        type=int,
        help="number of classes (default: the rows of the label table but the last, the null class)",
    )
    parser.add_argument("--num_heads", type=int, help="number of heads; required for a DiT of unusual width")
    parser.add_argument(
        "--directions", type=int, choices=[4, 2, 1], help="DiG's scan directions (default: 4)"
    )
    parser.add_argument(
        "--conv", choices=["after", "inside"], help="position of DiG's convolution (default: after)"
    )
    parser.add_argument(
        "--skip_alignment",
        choices=["upstream", "raster"],
        help="alignment of DiG's long skips (default: upstream)",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Run the command and return the exit status: 0, 1 (error), 2 (invalid arguments), 130 (interrupted)."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    log.setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs each file
    try:
        options = vars(_parser().parse_args(arguments))
        jax.config.update("jax_platforms", "cpu")  # nothing is computed
        convert(**options)
    except UserError as error:
        sys.stderr.write(f"error: {one_line(error)}\n")
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was written\n")
        return 130
    return 0
