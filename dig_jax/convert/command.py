"""Other people's parameters as ours, and ours as theirs.

python -m dig_jax.convert 0400000.pt dig.safetensors          upstream's DiG, or DiT, SiT, diffusers' DiT
python -m dig_jax.convert 0400000.pt runs/dig --tree=model    as a workdir with a checkpoint
python -m dig_jax.convert runs/dig dig.pt                     a run of ours, or a file of --mode=export,
python -m dig_jax.convert runs/dig dig.safetensors            under upstream's names
python -m dig_jax.convert runs/dit transformer                a DiT of ours as a folder of diffusers

What is written is whole or not at all. dig_jax.load and --config.init_from read what is ours.
"""

import argparse
import contextlib
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np
from flax import traverse_util

from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.checkpoints.parameter_file import FORMAT, write_parameter_file, writing_to
from dig_jax.checkpoints.reader import has_checkpoints, read_model
from dig_jax.components import Components
from dig_jax.config import Config
from dig_jax.convert import diffusers
from dig_jax.convert.names import read_params, torch_arrays
from dig_jax.convert.pytorch.writer import write_torch
from dig_jax.convert.recognize import (
    EMA,
    images_of,
    is_flow_matching,
    looks_like_official_dit,
    recognize,
)
from dig_jax.convert.sources import open_upstream
from dig_jax.errors import CheckpointError, ConfigError, InvalidFile, UserError
from dig_jax.files.atomic import new_folder, replacing, write_json
from dig_jax.files.safetensors import open_safetensors, write_safetensors

log = logging.getLogger("dig_jax.convert")


def convert(source: Path, target: Path, tree: str | None = None, **options: str | int | None) -> None:
    """Converts in the direction that the source stands for; `options` as in `recognize`.

    Args:
        source: somebody's file; or ours: a workdir, a checkpoint in it, or an exported file.
        target: FILE.safetensors; of somebody's parameters also a new workdir, of ours also FILE.pt or a new
            folder in diffusers' layout.
        tree: of a .pt file, the tree; of a run of ours, the average's decay or "params".

    Raises:
        ConfigError: the target is there already, or an option is missing or cannot be.
        CheckpointError: the source cannot be read, or not as this, or the target not be written.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already; delete it, or take another name")
    ours = _is_ours(source)
    kinds, known = (
        ((".safetensors", ".pt", ""), "FILE.safetensors, FILE.pt or a new folder for diffusers")
        if ours
        else ((".safetensors", ""), "FILE.safetensors or a new workdir")
    )
    if target.suffix not in kinds:
        raise ConfigError(f"{target}: what {source} is converted to must be {known}")
    if ours and any(value is not None for value in options.values()):
        raise ConfigError(f"{source} has its config in it: of the options, only --tree goes with it")
    (_to_theirs if ours else _to_ours)(source, target, tree, **options)


def _to_ours(source: Path, target: Path, tree: str | None, **options: str | int | None) -> None:
    with open_upstream(source, tree) as found:
        name = options.get("model") or source.name
        try:
            settings = recognize(found, **options)
            components = Components(settings, images_of(settings))
            params = read_params(components.abstract_model, found.stored)
        except ConfigError:
            raise
        except InvalidFile:  # open_upstream names the file
            raise
        except (UserError, ValueError) as error:
            raise CheckpointError(f"{source}: {error}") from error
        _tell(settings, found.tree, params)
        if is_flow_matching(found, name):
            log.warning(
                "SiT is trained by flow matching, for which there is no sampler here yet: start a run"
                " from these parameters, or compute with them; --mode=sample would draw noise"
            )
        elif looks_like_official_dit(found, settings):
            log.warning(
                "these have the names and shapes of the DiT-XL/2 that Meta published: its weights are under"
                " CC-BY-NC, which excludes commercial use"
            )
    if target.suffix:
        # The step is not known.
        write_parameter_file(target, components, 0, traverse_util.unflatten_dict(params))
    else:
        _write_workdir(target, components, params)
    log.info("written: %s", target)


def _to_theirs(source: Path, target: Path, tree: str | None, **options: None) -> None:
    components, step, params = read_model(source, tree)
    flat = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}
    model = components.abstract_model
    try:
        about = None if target.suffix else diffusers.config_of(model)
        arrays = torch_arrays(model, flat)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    with writing_to(target):
        if target.suffix == ".pt":
            with replacing(target) as file:
                write_torch(file, arrays)
        elif target.suffix:
            write_safetensors(target, arrays, {"format": "pt"})
        else:
            with new_folder(target) as folder:
                write_json(folder / "config.json", about)
                arrays = diffusers.from_upstream(arrays, model.blocks.depth)
                write_safetensors(folder / diffusers.WEIGHTS, arrays, {"format": "pt"})
    log.info("written: %s, %d arrays of step %d", target, len(arrays), step)


def _is_ours(source: Path) -> bool:
    if not source.exists():
        raise CheckpointError(f"{source}: there is no such file or folder")
    if source.is_dir():
        return has_checkpoints(source)
    if source.suffix != ".safetensors":
        return False
    # What is no safetensors file is told by who reads it.
    with contextlib.suppress(CheckpointError), open_safetensors(source) as file:
        return file.metadata.get("format") == FORMAT
    return False


def _tell(settings: Config, tree: str, params: Mapping[tuple, np.ndarray]) -> None:
    model, options = settings.model, settings.data.options
    log.info(
        "%s, %s parameters%s: images of %s², %s channels, %s classes; conv=%s, norm=%s, skip=%s,"
        " directions=%s",
        model.name,
        f"{sum(leaf.size for leaf in params.values()):,}",
        f" of the tree {tree!r}" if tree else "",
        *(options[name] for name in ("image_size", "channels", "num_classes")),
        model.conv or "none",
        model.norm,
        model.skip or "none",
        model.directions,
    )


def _write_workdir(target: Path, components: Components, params: Mapping[tuple, np.ndarray]) -> None:
    """A checkpoint whose average and parameters are the same, without an optimiser's state."""
    nested = traverse_util.unflatten_dict(params)
    state = {"step": np.int32(0), "params": nested, "ema": {EMA: nested}}
    with writing_to(target), new_folder(target) as folder:
        with Checkpoints(folder, components.config.checkpoint) as checkpoints:
            data = {"examples": 0} | components.image_spec.to_dict()
            checkpoints.save(0, state, data, components.config)
        write_json(folder / "config.json", config_and_versions(components.config))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m dig_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", type=Path, help="somebody's file, or a run or an exported file of ours")
    parser.add_argument("target", type=Path, help="FILE.safetensors, FILE.pt, a new workdir or folder")
    parser.add_argument(
        "--tree", help="of a .pt file: ema, model, …; of ours: the average's decay, or params"
    )
    parser.add_argument("--model", help="such as DiG-XL/2, DiT-XL/2, SiT-XL/2; else by the shapes")
    parser.add_argument("--input_size", type=int, help="side of the images or latents; else by the positions")
    parser.add_argument("--num_classes", type=int, help="else by the table of labels")
    parser.add_argument("--num_heads", type=int, help="needed for a DiT of unusual width")
    parser.add_argument("--directions", type=int, choices=[4, 2, 1], help="of DiG's scans, if not 4")
    parser.add_argument(
        "--conv", choices=["after", "inside"], help="where DiG's convolution is, if not after"
    )
    parser.add_argument("--skip_alignment", choices=["upstream", "raster"], help="how DiG's skips are joined")
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command; gives the exit status, as those of main.py."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    log.setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of each file
    try:
        options = vars(_parser().parse_args(arguments))
        jax.config.update("jax_platforms", "cpu")  # nothing is computed
        convert(**options)
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
