"""Find and read the published weights of feature networks, strictly."""

import dataclasses
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from dig_jax.errors import CheckpointError, ConfigError
from dig_jax.files import hub, paths
from dig_jax.files.paths import Path, to_path
from dig_jax.files.safetensors import StoredArray
from dig_jax.files.weights import open_weights

# PyTorch's hub puts the beginning of a file's SHA-256 into its name.
_NAMED_HASH = re.compile(r".*-([0-9a-f]{8,})\.\w+")
_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Published:
    """Where weights can be had.

    network: name of the network.
    files: names of the files, the preferred one first.
    url: address of the first one.
    megabytes: its size.
    """

    network: str
    files: tuple[str, ...]
    url: str
    megabytes: int

    def missing(self, what: str) -> str:
        """Return an error message that says where to get the weights."""
        return f"{self.network}: {what}; download {self.url} ({self.megabytes:,} MB) and give its path"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to make a parameter from arrays of a file.

    names: names of the arrays.
    combine: function of the list of their values.
    """

    names: tuple[str, ...]
    combine: Callable[[list[np.ndarray]], np.ndarray]


def find_file(source: str, published: Published) -> Path:
    """Return the file of weights.

    Args:
        source: a file; a folder with one of the published files; or a repository of the Hugging Face Hub,
            "owner/name" or "owner/name/file".
        published: names of the files.

    Raises:
        ConfigError: there is no such file; the message says where to get it.
        CheckpointError: a published file is damaged, according to the hash in its name.
    """
    path = _find(source, published)
    match = _NAMED_HASH.fullmatch(path.name)
    if path.name in published.files and match and not paths.sha256(path).startswith(match[1]):
        raise CheckpointError(f"{path}: checksum mismatch with the file's name; download it again")
    return path


def _find(source: str, published: Published) -> Path:
    if not source:
        raise ConfigError(published.missing("no weights"))
    path = to_path(source)
    if path.is_dir():
        found = [path / name for name in published.files if (path / name).is_file()]
        if not found:
            names = " or ".join(published.files)
            raise ConfigError(published.missing(f"no weights in {path}: expected {names}"))
        return found[0]
    if path.exists():
        return path
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if hub.is_repository(f"{owner}/{name}"):
        return _download(f"{owner}/{name}", [file] if file else published.files, published)
    raise ConfigError(published.missing(f"no such file: {path}"))


def _download(repository: str, files: Sequence[str], published: Published) -> Path:
    """Return the first file that the repository has."""
    failures = []
    for file in files:
        try:
            return hub.download(repository, file)
        except CheckpointError as error:
            failures.append(str(error))
    raise ConfigError(published.missing(f"no such file: {repository}, and {failures[0]}"))


def load_weights(
    network: Any, path: Path, layouts: Sequence[Mapping[tuple, Recipe]], ignored: re.Pattern[str]
) -> Any:
    """Return a network with the weights of a file, and with their hash.

    Args:
        network: the module, whose parameters may be abstract.
        path: the file.
        layouts: for each known layout of files, the recipe of each parameter by its path in the module.
        ignored: names of arrays that are not read.

    Raises:
        CheckpointError: the file is unreadable or damaged, or it lacks arrays of the network or has others.
    """
    graphdef, state = nnx.split(network)
    variables, digest, arrays = dict(nnx.to_flat_state(state)), hashlib.sha256(), {}
    with open_weights(path) as weights:
        try:
            stored = {name: a for name, a in weights.below("").items() if not ignored.fullmatch(name)}
            recipes = _layout_of(stored, layouts)
            for parameter in sorted(variables, key=str):
                values = _combined(stored, recipes[parameter], variables[parameter].shape)
                digest.update(repr((parameter, values.shape)).encode())
                digest.update(values.data)
                arrays[parameter] = values
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    arrays = jax.device_put(arrays)
    flat = [(parameter, variable.replace(arrays[parameter])) for parameter, variable in variables.items()]
    loaded = nnx.merge(graphdef, nnx.from_flat_state(flat))
    loaded.weights_hash = digest.hexdigest()
    return loaded


def _layout_of(
    stored: Mapping[str, StoredArray], layouts: Sequence[Mapping[tuple, Recipe]]
) -> Mapping[tuple, Recipe]:
    """Return the layout that matches the names in the file."""
    expected = [{name for recipe in layout.values() for name in recipe.names} for layout in layouts]
    common = [len(names & set(stored)) for names in expected]
    best = common.index(max(common))
    missing, unexpected = expected[best] - set(stored), set(stored) - expected[best]
    if missing or unexpected:
        listed = [
            f"{kind}: {', '.join(name[:100] for name in sorted(names)[:4])}{' …' if len(names) > 4 else ''}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise ValueError(f"arrays of another network; {'; '.join(listed)}")
    return layouts[best]


def _combined(stored: Mapping[str, StoredArray], recipe: Recipe, shape: tuple[int, ...]) -> np.ndarray:
    """Return a parameter in float32."""
    first = recipe.names[0]
    for name in recipe.names:
        if stored[name].dtype not in _DTYPES:
            raise ValueError(f"{name} is {stored[name].dtype}; expected {', '.join(_DTYPES)}")
    shapes = [list(stored[name].shape) for name in recipe.names]
    try:
        with np.errstate(over="ignore"):  # an infinite value is reported below
            values = recipe.combine([stored[name].read().astype(np.float32) for name in recipe.names])
    except ValueError as error:
        raise ValueError(f"{first} has shape {shapes[0]}, which does not fit the network") from error
    if values.shape != shape:
        raise ValueError(
            f"{first} has shape {shapes[0]}, which gives {list(values.shape)}; expected {list(shape)}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{first} has non-finite values")
    return np.ascontiguousarray(values, np.float32)
