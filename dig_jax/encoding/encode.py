"""--mode=encode: compute the latents of images once and write them to a latent cache.

`dig_jax.data.latents` describes the format. Each file is written under a temporary name and is complete when
its JSON description exists. A run that was killed resumes with the incomplete files, on any number of
processes.
"""

import contextlib
import functools
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dig_jax import config
from dig_jax.autoencoder import Autoencoder
from dig_jax.components import Components
from dig_jax.config import Config
from dig_jax.data import SPLITS, Source, open_source
from dig_jax.data.latents import FORMAT, HEADER_FILE, INDEX_FILE, Shard, checksum
from dig_jax.data.registry import source_options
from dig_jax.data.summary import summary
from dig_jax.encoding.shard_writer import Chunk, ShardWriter
from dig_jax.errors import (
    ConfigError,
    InvalidFile,
    UserError,
    naming_directory,
    one_line,
)
from dig_jax.files.atomic import remove_leftovers, write_json
from dig_jax.files.json_file import read_json
from dig_jax.files.lock import LOCK_FILE
from dig_jax.files.paths import Path, absolute, check_utf8, children, delete, make_folder, sha256, to_path
from dig_jax.files.paths import size as file_size
from dig_jax.parallel import (
    barrier,
    check_agreement,
    check_shared_directory,
    on_process_0,
    one_writer,
    processes_without,
)
from dig_jax.progress import duration

log = logging.getLogger(__name__)


def encode(settings: Config) -> dict[str, Any]:
    """Write the missing files of the latent cache; verify the checksums of a complete one.

    Returns:
        The content of index.json.

    Raises:
        UserError: invalid settings, a directory that is in use or has other files, or a full disk.
        KeyboardInterrupt: also on SIGTERM.
    """
    started = time.monotonic()
    fields = config.to_dict(settings)
    check_agreement(config.flattened({name: fields[name] for name in ("data", "autoencoder", "encode")}))
    directory = _directory(settings)
    autoencoder, sources = _autoencoder(settings), _sources(settings)
    for line in summary(sources["train"], sources["heldout"]) if jax.process_index() == 0 else ():
        log.info(line)
    header = _header(settings, autoencoder, sources)
    check_agreement(config.flattened(header))
    size = settings.encode.shard_size
    chunks = [chunk for split in SPLITS for chunk in _chunks(split, len(sources[split]), size)]
    with one_writer(directory / LOCK_FILE, f"the latent cache {directory}"), _sigterm_as_interrupt() as check:
        on_process_0(functools.partial(_claim, directory, header))
        check_shared_directory(directory)
        if on_process_0((directory / INDEX_FILE).exists):
            _check_files(directory, chunks)
        missing = on_process_0(
            lambda: [n for n, chunk in enumerate(chunks) if _finished_shard(directory, chunk) is None]
        )
        if missing:
            images = sum(len(chunks[number]) for number in missing)
            log.info("writing %d of %d files to %s: %d images", len(missing), len(chunks), directory, images)
            mine = [chunks[n] for n in missing[jax.process_index() :: jax.process_count()]]
            with naming_directory(directory):
                ShardWriter(directory, autoencoder, sources, settings.encode).write(mine, check)
        check()
        barrier("encoded")
        index = on_process_0(functools.partial(_write_index, directory, header, chunks))
    if not missing:
        log.info("all latents are already in %s; nothing was encoded", directory)
    _log_summary(directory, index, time.monotonic() - started)
    return index


def _directory(settings: Config) -> Path:
    path = ""
    if settings.data.name == "latents":
        path = source_options("config.data", "latents", settings.data.options).get("path", "")
    if not path:
        raise ConfigError(
            f"invalid config.data.name={settings.data.name!r} or config.data.options.path={path!r} for"
            " --mode=encode; expected 'latents' and an output directory"
        )
    directory = absolute(to_path(path))
    check_utf8(directory, "config.data.options.path")
    return directory


def _autoencoder(settings: Config) -> Autoencoder:
    autoencoder = Components(settings).autoencoder
    if autoencoder is None:
        raise ConfigError("missing config.autoencoder.path; expected an autoencoder for --mode=encode")
    return autoencoder


def _sources(settings: Config) -> dict[str, Source]:
    if settings.encode.name is None:
        raise ConfigError(
            "missing config.encode.name; expected the source of the images, such as image_folder"
        )
    name, options = settings.encode.name, settings.encode.options
    return {split: open_source("config.encode", name, split, options) for split in SPLITS}


def _header(settings: Config, autoencoder: Autoencoder, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Return the settings that a resumed run must share with the first one.

    Raises:
        ConfigError: the images do not match the autoencoder, or the latents do not match `config.data`.
    """
    source, sizes = sources["train"], autoencoder.config
    height, width, channels = source.image_shape
    if height % sizes.downsampling or width % sizes.downsampling or channels != sizes.in_channels:
        raise ConfigError(
            f"config.encode: invalid images of {height}×{width} pixels and {channels} channels; expected"
            f" multiples of {sizes.downsampling} pixels and {sizes.in_channels} channels for this autoencoder"
        )
    shape = [height // sizes.downsampling, width // sizes.downsampling, sizes.latent_channels]
    side = shape[0] if shape[0] == shape[1] else tuple(shape[:2])
    found = {"image_size": side, "channels": shape[2], "num_classes": source.num_classes}
    given = source_options("config.data", "latents", settings.data.options)
    for name, value in found.items():
        if given.get(name, -1) not in (-1, value, (value, value)):
            raise ConfigError(
                f"invalid config.data.options.{name}={given[name]}; expected {value} for this config.encode"
                " and config.autoencoder"
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


def _chunks(split: str, length: int, size: int) -> Iterator[Chunk]:
    for number, first in enumerate(range(0, length, size)):
        yield Chunk(split, number, first, min(first + size, length))


def _claim(directory: Path, header: dict[str, Any]) -> None:
    """Create the directory, or check that it belongs to this header, and remove temporary files."""
    path = directory / HEADER_FILE
    if path.exists():
        _check_header(path, header)
    elif any(not entry.name.startswith(".") for entry in children(directory)):
        raise UserError(f"{directory} contains other files; expected a new directory for the latents")
    with naming_directory(directory):
        make_folder(directory)
        if not path.exists():
            write_json(path, header)
        for split in SPLITS:
            make_folder(directory / split)
            remove_leftovers(directory / split)
        remove_leftovers(directory)


def _check_header(path: Path, header: dict[str, Any]) -> None:
    """Raise unless a file holds this header; the path of the autoencoder may differ."""
    try:
        stored = read_json(path)
        stored["autoencoder"]["path"] = header["autoencoder"]["path"]
        old, new = config.flattened(stored), config.flattened(header)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        reason = one_line(error, name_type=True)
        raise UserError(f"cannot read {path}: {reason}; use a new config.data.options.path") from error
    changed = [
        f"{name}: {str(old.get(name))[:80]} → {str(new.get(name))[:80]}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]
    if changed:
        raise ConfigError(
            f"the latents in {path.parent} were created with different settings: {'; '.join(changed[:5])}."
            " Use a new config.data.options.path or restore those settings"
        )


def _finished_shard(directory: Path, chunk: Chunk) -> Shard | None:
    """Return the description of a chunk's file, or None unless the file is complete."""
    try:
        shard = Shard.from_dict(read_json(directory / chunk.description))
        size = file_size(directory / chunk.file)
    except (AttributeError, TypeError, ValueError, FileNotFoundError):
        return None
    is_complete = shard.images + len(shard.unreadable) == len(chunk)
    return shard if is_complete and shard.file == chunk.file and shard.bytes == size else None


def _check_files(directory: Path, chunks: Sequence[Chunk]) -> None:
    """Verify the checksums of all files; delete the descriptions of corrupt ones."""
    log.info("the latents in %s are complete; verifying the checksums of %d files", directory, len(chunks))
    corrupt = []
    for chunk in chunks[jax.process_index() :: jax.process_count()]:
        shard = _finished_shard(directory, chunk)
        if shard is None or sha256(directory / chunk.file) != shard.sha256:
            corrupt.append(chunk)
    barrier("checked")
    if processes_without(not corrupt):
        with naming_directory(directory):
            on_process_0(functools.partial(delete, directory / INDEX_FILE))
            for chunk in corrupt:
                log.warning("rewriting corrupt file %s", directory / chunk.file)
                delete(directory / chunk.description)
    barrier("corrupt files deleted")


def _write_index(directory: Path, header: dict[str, Any], chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Write the index unless it exists, and return it."""
    splits: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for chunk in chunks:
        shard = _finished_shard(directory, chunk)
        if shard is None or {len(shard.sums), len(shard.squares)} != {header["latents"]["shape"][2]}:
            raise UserError(
                f"{directory / chunk.file} was deleted or changed during the run; run --mode=encode again"
            )
        splits[chunk.split].append(shard)
    if not any(shard.images for shard in splits["train"]):
        unreadable = sum(len(shard.unreadable) for shard in splits["train"])
        raise UserError(f"no image to train on: all {unreadable} images are unreadable; the log names them")
    index = {
        **header,
        "splits": {split: [shard._asdict() for shard in shards] for split, shards in splits.items()},
        "latents": {**header["latents"], **_statistics(splits["train"], header["latents"]["shape"])},
    }
    index["sha256"] = checksum(index)
    index = json.loads(json.dumps(index))
    with naming_directory(directory):
        with contextlib.suppress(FileNotFoundError, InvalidFile):
            if read_json(directory / INDEX_FILE) == index:
                return index
        write_json(directory / INDEX_FILE, index)
    return index


def _statistics(shards: Sequence[Shard], shape: Sequence[int]) -> dict[str, list[float]]:
    """Return mean and deviation per channel of unscaled samples, over both mirror images."""
    height, width, channels = shape
    count = max(2 * height * width * sum(shard.images for shard in shards), 1)
    sums, squares = (
        np.sum([getattr(shard, name) for shard in shards] or np.zeros((1, channels)), axis=0) / count
        for name in ("sums", "squares")
    )
    deviation = np.sqrt(np.maximum(squares - sums**2, 0))
    return {"mean": sums.tolist(), "deviation": deviation.tolist()}


def _log_summary(directory: Path, index: Mapping[str, Any], seconds: float) -> None:
    shards = [shard for split in SPLITS for shard in index["splits"][split]]
    images, unreadable = sum(s["images"] for s in shards), sum(len(s["unreadable"]) for s in shards)
    log.info(
        "latents of %d images in %s: %d files, %.4g GB, in %s%s",
        images,
        directory,
        len(shards),
        sum(shard["bytes"] for shard in shards) / 1e9,
        duration(seconds),
        f"; skipped {unreadable} unreadable images, which {INDEX_FILE} names" if unreadable else "",
    )
    mean, deviation = (" ".join(f"{x:.3g}" for x in index["latents"][name]) for name in ("mean", "deviation"))
    scale = index["autoencoder"]["scaling_factor"]
    log.info("latents per channel, before scaling by %g: mean %s, deviation %s", scale, mean, deviation)


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[Callable[[], None]]:
    """Raise KeyboardInterrupt on SIGTERM, as on Ctrl-C, within the context.

    Yields:
        A function that raises it after a signal. Call it between batches: libraries drop an exception that
        a signal handler raises in their callbacks.
    """
    received = threading.Event()

    def check() -> None:
        if received.is_set():
            raise KeyboardInterrupt

    def handle(number: int, frame: object) -> None:
        received.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread handles signals
        yield check
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield check
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler or signal.SIG_DFL)
