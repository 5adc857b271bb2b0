"""From pictures to latents on disk, once: what --mode=encode does.

The files are those of `dig_jax.data.latents`. A file is written under another name, and counts when its JSON
stands beside it: whenever a run is killed, the next one goes on with the files that do not count, on any
number of processes.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dig_jax import config
from dig_jax.autoencoder import Autoencoder
from dig_jax.components import Components
from dig_jax.config import Config
from dig_jax.data import SPLITS, Source, load_source
from dig_jax.data.latents import BEGUN, FORMAT, INDEX, Shard, checksum
from dig_jax.encoding.shard_writer import Part, ShardWriter, file_sha256
from dig_jax.errors import ConfigError, UserError, naming_directory, naming_setting
from dig_jax.files.atomic import write_json
from dig_jax.parallel import barrier, check_agreement, check_shared_directory, on_process_0, processes_without
from dig_jax.progress import duration

log = logging.getLogger(__name__)


def encode(settings: Config) -> dict[str, Any]:
    """Writes the latents of all images of `settings.encode`, or what is missing; checks them if nothing is.

    Returns:
        What is in index.json.

    Raises:
        UserError: settings that cannot be, a directory with other things in it, a disk that is full.
        KeyboardInterrupt: also at SIGTERM.
    """
    began = time.monotonic()
    fields = config.to_dict(settings)
    check_agreement(config.flattened({name: fields[name] for name in ("data", "autoencoder", "encode")}))
    directory = _directory(settings)
    autoencoder, sources = _autoencoder(settings), _sources(settings)
    header = _header(settings, autoencoder, sources)
    check_agreement(config.flattened(header))
    on_process_0(functools.partial(_claim, directory, header))
    check_shared_directory(directory)
    parts = [
        part for split in SPLITS for part in _parts(split, len(sources[split]), settings.encode.shard_size)
    ]
    with _ended_by_sigterm():
        if on_process_0((directory / INDEX).exists):
            _check_files(directory, parts)
        missing = on_process_0(
            lambda: [n for n, part in enumerate(parts) if _finished(directory, part) is None]
        )
        if missing:
            _say_what_is_missing(directory, parts, missing)
            mine = [parts[n] for n in missing[jax.process_index() :: jax.process_count()]]
            with naming_directory(directory):
                ShardWriter(directory, autoencoder, sources, settings.encode).write(mine)
        barrier("encoded")
    index = on_process_0(functools.partial(_write_index, directory, header, parts))
    _say_what_there_is(directory, index, time.monotonic() - began)
    return index


def _directory(settings: Config) -> Path:
    path = settings.data.options.get("path", "")
    if settings.data.name != "latents" or not path:
        raise ConfigError(
            "--mode=encode writes what config.data.name=latents reads, to config.data.options.path;"
            f" they are {settings.data.name} and {path!r}"
        )
    return Path(path).expanduser().absolute()


def _autoencoder(settings: Config) -> Autoencoder:
    autoencoder = Components(settings).autoencoder
    if autoencoder is None:
        raise ConfigError("config.autoencoder.path is missing: --mode=encode computes its latents")
    return autoencoder


def _sources(settings: Config) -> dict[str, Source]:
    if settings.encode.name is None:
        raise ConfigError("config.encode.name is missing: the source of the images, such as image_folder")
    with naming_setting("config.encode"):
        return {
            split: load_source(settings.encode.name, split, **settings.encode.options) for split in SPLITS
        }


def _header(settings: Config, autoencoder: Autoencoder, sources: Mapping[str, Source]) -> dict[str, Any]:
    """What the latents are of, and how they are made: all that must be equal when it is gone on with.

    Raises:
        ConfigError: the autoencoder does not take such images, or the model would not take such latents.
    """
    source, sizes = sources["train"], autoencoder.config
    height, width, channels = source.image_shape
    if height % sizes.downsampling or width % sizes.downsampling or channels != sizes.in_channels:
        raise ConfigError(
            f"config.encode: images of {height}×{width} pixels and {channels} channels; the autoencoder takes"
            f" multiples of {sizes.downsampling} and {sizes.in_channels} channels"
        )
    shape = [height // sizes.downsampling, width // sizes.downsampling, sizes.latent_channels]
    found = {"image_size": shape[0], "channels": shape[2], "num_classes": source.num_classes}
    for name, value in found.items():
        if settings.data.options.get(name, -1) not in (-1, value):
            raise ConfigError(
                f"config.data.options.{name}={settings.data.options[name]}, but config.encode and"
                f" config.autoencoder give {value}"
            )
    return {
        "format": FORMAT,
        "autoencoder": {
            "path": settings.autoencoder.path,
            "fingerprint": autoencoder.fingerprint(),
            "scaling_factor": sizes.scaling_factor,
            "dtype": settings.autoencoder.dtype,
        },
        "pictures": {
            "name": source.name,
            "fingerprints": {split: sources[split].fingerprint for split in SPLITS},
            "size": [height, width],
            "crop": getattr(source, "crop", None),
            "upright": getattr(source, "upright", None),
        },
        "latents": {"shape": shape, "dtype": settings.encode.dtype},
        "shard_size": settings.encode.shard_size,
        "class_names": list(source.class_names),
        "flip": source.flip,
    }


def _parts(split: str, length: int, size: int) -> Iterator[Part]:
    for number, first in enumerate(range(0, length, size)):
        yield Part(split, number, first, min(first + size, length))


def _claim(directory: Path, header: dict[str, Any]) -> None:
    """Makes the directory, unless something else is in it, and clears it of what killed runs left."""
    path = directory / BEGUN
    if path.exists():
        try:
            begun = json.loads(path.read_text())
            begun["autoencoder"]["path"] = header["autoencoder"]["path"]  # which may have moved
            old, new = config.flattened(begun), config.flattened(header)
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}; take another directory") from error
        changed = [
            f"{name}: {str(old.get(name))[:80]} → {str(new.get(name))[:80]}"
            for name in sorted(old | new)
            if old.get(name) != new.get(name)
        ]
        if changed:
            raise ConfigError(
                f"the latents in {directory} were begun with others: {'; '.join(changed[:5])}. Take another"
                " config.data.options.path, or these settings again"
            )
    elif directory.exists() and any(not name.startswith(".") for name in os.listdir(directory)):
        raise UserError(f"{directory} has other things in it; latents take a directory of their own")
    with naming_directory(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_json(path, header)
        for split in SPLITS:
            (directory / split).mkdir(exist_ok=True)
            for left in (directory / split).glob(".*"):
                left.unlink()


def _json(path: Path) -> Any:
    """What is in a file; None if there is none, or damage."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, FileNotFoundError):
        return None


def _finished(directory: Path, part: Part) -> Shard | None:
    """What is known of a part's file, if it is there."""
    try:
        shard = Shard.of(_json(directory / part.description))
        size = (directory / part.file).stat().st_size
    except (AttributeError, TypeError, ValueError, FileNotFoundError):
        return None
    whole = shard.images + len(shard.unreadable) == len(part)
    return shard if whole and shard.file == part.file and shard.bytes == size else None


def _check_files(directory: Path, parts: Sequence[Part]) -> None:
    """Compares all files with their checksums; those that are damaged no longer count."""
    log.info("the latents in %s are complete; comparing %d files with their checksums", directory, len(parts))
    damaged = []
    for part in parts[jax.process_index() :: jax.process_count()]:
        shard = _finished(directory, part)
        if shard is None or file_sha256(directory / part.file) != shard.sha256:
            damaged.append(part)
    barrier("checked")
    if processes_without(not damaged):
        with naming_directory(directory):
            on_process_0(functools.partial((directory / INDEX).unlink, missing_ok=True))
            for part in damaged:
                log.warning("%s is damaged, and is written anew", directory / part.file)
                (directory / part.description).unlink(missing_ok=True)
    barrier("uncounted")


def _write_index(directory: Path, header: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
    """Tells of all files, unless the index is there already."""
    shards = {part: _finished(directory, part) for part in parts}
    if None in shards.values():
        gone = next(part.file for part, shard in shards.items() if shard is None)
        raise UserError(f"{directory / gone} has vanished or changed since it was written; start again")
    splits = {split: [s for part, s in shards.items() if part.split == split] for split in SPLITS}
    index = {**header, "splits": {split: [s._asdict() for s in found] for split, found in splits.items()}}
    index["latents"] = {**header["latents"], **_statistics(splits["train"], header["latents"]["shape"])}
    index["sha256"] = checksum(index)
    index = json.loads(json.dumps(index))
    with naming_directory(directory):
        if _json(directory / INDEX) != index:
            write_json(directory / INDEX, index)
    return index


def _statistics(shards: Sequence[Shard], shape: Sequence[int]) -> dict[str, list[float]]:
    """Mean and deviation per channel of unscaled draws from the posteriors of both mirror images."""
    height, width, channels = shape
    count = max(2 * height * width * sum(shard.images for shard in shards), 1)
    sums, squares = (
        np.sum([getattr(shard, name) for shard in shards] or np.zeros((1, channels)), axis=0) / count
        for name in ("sums", "squares")
    )
    deviation = np.sqrt(np.maximum(squares - sums**2, 0))
    return {"mean": sums.tolist(), "deviation": deviation.tolist()}


def _say_what_is_missing(directory: Path, parts: Sequence[Part], missing: Sequence[int]) -> None:
    images = sum(len(parts[number]) for number in missing)
    log.info(
        "%d of %d files are to be written to %s, of %d images", len(missing), len(parts), directory, images
    )


def _say_what_there_is(directory: Path, index: Mapping[str, Any], seconds: float) -> None:
    shards = [shard for split in SPLITS for shard in index["splits"][split]]
    images, unreadable = sum(s["images"] for s in shards), sum(len(s["unreadable"]) for s in shards)
    log.info(
        "the latents of %d images are in %s: %d files, %.4g GB, after %s%s",
        images,
        directory,
        len(shards),
        sum(shard["bytes"] for shard in shards) / 1e9,
        duration(seconds),
        f"; {unreadable} images could not be read, {INDEX} names them" if unreadable else "",
    )
    mean, deviation = (" ".join(f"{x:.3g}" for x in index["latents"][name]) for name in ("mean", "deviation"))
    scale = index["autoencoder"]["scaling_factor"]
    log.info("per channel, before the scale of %g: mean %s, deviation %s", scale, mean, deviation)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """While it is open SIGTERM does what ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # to which Python leaves signals
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
