"""Checks of the program, its packages and the machine."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import jax

from dig_jax import runtime
from dig_jax.doctor.finding import Finding
from dig_jax.errors import UserError, install_command, one_line
from dig_jax.files.paths import Path as AnyPath
from dig_jax.files.paths import is_remote

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# A module of each extra that a user may want, and what it is for.
_EXTRAS = {
    "latents": ("huggingface_hub", "autoencoders from the Hugging Face Hub"),
    "hub": ("datasets", "data sets from the Hub"),
    "tfds": ("tensorflow_datasets", "TFDS"),
    "storage": ("gcsfs", "gs:// and s3://"),
    "demo": ("gradio", "--mode=demo"),
    "ode": ("diffrax", "the sampler dopri5"),
    "export": ("onnx", "StableHLO and ONNX files"),
    "wandb": ("wandb", "Weights & Biases"),
}
# Files that drivers make, by the extra that uses their chips.
_DRIVERS = {"gpu": ("/dev/nvidia0", "cuda"), "tpu": ("/dev/accel0", "tpu")}
_LOW_DISK = 2**30
_SECONDS = 4


def program() -> Finding:
    """Return the versions of this program, Python and the main packages."""
    packages = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    own = f"dig-jax {_version('dig-jax')}, pallas-gla {_version('pallas-gla')}"
    lines = (f"{own}, Python {platform.python_version()} on {platform.platform()}", packages)
    if _version("jax") != _version("jaxlib"):
        return Finding.problem(*lines, "jax and jaxlib differ; pip install --upgrade jax jaxlib")
    return Finding.of(*lines)


def extras() -> Finding:
    """Return which optional packages are installed."""
    missing = {
        name: use for name, (module, use) in _EXTRAS.items() if importlib.util.find_spec(module) is None
    }
    found = ", ".join(name for name in _EXTRAS if name not in missing) or "none"
    lines = [f"not installed: {name} ({use}); {install_command(name)}" for name, use in missing.items()]
    return Finding.of(f"installed: {found}", *lines)


def devices() -> Finding:
    """Return the devices that JAX uses, and chips that it does not use."""
    try:
        runtime.require_devices()
    except UserError as error:
        return Finding.problem(str(error))
    kinds = Counter((device.platform, device.device_kind) for device in jax.devices())
    lines = [f"{count} × {kind} ({name})" for (name, kind), count in kinds.items()]
    if jax.process_count() > 1:
        lines.append(f"process {jax.process_index()} of {jax.process_count()}")
    for extra, (file, name) in _DRIVERS.items():
        if os.path.exists(file) and jax.default_backend() not in (extra, name):
            setting = os.environ.get("JAX_PLATFORMS")
            reason = f"JAX_PLATFORMS={setting}" if setting else install_command(extra)
            return Finding.problem(*lines, f"there is a {extra.upper()} that JAX does not use: {reason}")
    return Finding.of(*lines)


def cache() -> Finding:
    """Return where compiled programs are kept, and how many there are."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder:
        return Finding.of("compiled programs are not kept; unset JAX_COMPILATION_CACHE_DIR to keep them")
    if "://" in folder:
        return Finding.of(f"{folder}: compiled programs")
    files = [entry.stat().st_size for entry in os.scandir(folder)] if os.path.isdir(folder) else []
    text = f"{folder}: compiled programs take {_size(sum(files))} in {len(files)} files"
    if not os.access(_existing(Path(folder)), os.W_OK):
        return Finding.problem(text, "this folder cannot be written to; set JAX_COMPILATION_CACHE_DIR")
    return Finding.of(text)


def disk(workdir: AnyPath) -> Finding:
    """Return the free space of the workdir's disk."""
    if is_remote(workdir):
        return Finding.of(f"{workdir} is in object storage")
    folder = _existing(Path(workdir).absolute())
    free = shutil.disk_usage(folder).free
    text = f"{_size(free)} free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding.problem(f"cannot write to {folder}; choose another --workdir")
    if free < _LOW_DISK:
        return Finding.problem(f"{text}; a checkpoint of DiG-XL/2 with one average takes 11 GB")
    return Finding.of(text)


def memory() -> Finding:
    """Return the memory and the cores of this machine."""
    cores = f"{os.cpu_count()} cores"
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not on Windows
        return Finding.of(cores)
    return Finding.of(f"{_size(size)}, {cores}")


def network() -> Finding:
    """Return whether the Hugging Face Hub can be reached; only autoencoders and data sets there need it."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return Finding.of("not tried: HF_HUB_OFFLINE is set")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    started = time.monotonic()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_SECONDS):
            pass
    except urllib.error.HTTPError:  # it answered
        pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = one_line(reason) if isinstance(reason, BaseException) else str(reason)
        return Finding.of(f"{address} cannot be reached ({text}); autoencoders and data must be local")
    return Finding.of(f"{address} answers in {time.monotonic() - started:.1f} s")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _existing(path: Path) -> Path:
    """Return the path or its nearest parent that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
