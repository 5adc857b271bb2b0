"""Features of real images to compare with: computed from images, or read from published statistics.

A reference is named by `config.evaluation.reference`:

- "train" or "heldout": a split of the config's data;
- a folder of images, cropped as by ADM to the size of the images to score;
- an npz file of images `arr_0`;
- an npz file of ADM's evaluator: `mu`, `sigma` (pool features), `mu_s`, `sigma_s` (spatial ones), and
  optionally images `arr_0`, which scores of single images use;
- a reference.npz that an earlier evaluation wrote.
"""

import contextlib
import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from dig_jax.components import Components
from dig_jax.data.source import SPLITS
from dig_jax.errors import ConfigError, UserError, one_line
from dig_jax.evaluation.collection import Collection, Outputs
from dig_jax.evaluation.features.network import FeatureNetwork
from dig_jax.evaluation.image_sets import FolderImages, Images, NpzImages, Shape, SourceImages
from dig_jax.evaluation.moments import Gaussian
from dig_jax.evaluation.scores import FeatureSet
from dig_jax.files.atomic import replacing
from dig_jax.files.json_file import parse_object
from dig_jax.files.paths import Path, to_path
from dig_jax.parallel import on_process_0

SETTING = "config.evaluation.reference"
Networks = Mapping[str, FeatureNetwork]
Needs = Mapping[str, Outputs]
# Computes the features of all images of a set.
Collect = Callable[[Images, Networks, Needs], dict[str, Collection]]

# Names in files of ADM's evaluator.
_ADM = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """Features of real images.

    Attributes:
        features: features by network.
        description: where they are from, for the record of a score.
    """

    features: Mapping[str, FeatureSet]
    description: Mapping[str, Any]


def read_reference(
    text: str,
    components: Components,
    shape: Shape,
    networks: Networks,
    needs: Needs,
    collect: Collect,
    cache: Path | None = None,
) -> Reference:
    """Return the reference that a config names. All processes call it.

    Args:
        text: `config.evaluation.reference`.
        components: the data of "train" and "heldout".
        shape: shape of the images to score.
        networks: the feature networks.
        needs: outputs that scores need, by network.
        collect: computes features.
        cache: file in which process 0 keeps computed features.

    Returns:
        The reference; if the features come from the cache, they are empty except on process 0.

    Raises:
        UserError: a missing or damaged file, images of another shape, or features of another network.
    """
    check_reference(text, components)
    if text in SPLITS:
        return _computed(_split(components, text), shape, networks, needs, collect, cache)
    path = to_path(text)
    if path.is_dir():
        return _computed(FolderImages(path, wanted=shape), shape, networks, needs, collect, cache)
    names = _names(path)
    if "reference" in names:
        return load_reference(path, shape, networks, needs)
    if {"mu", "sigma"} <= names:
        return _adm(path, "arr_0" in names, shape, networks, needs, collect)
    return _computed(NpzImages(path), shape, networks, needs, collect, cache)


def check_reference(text: str, components: Components) -> None:
    """Check that a reference exists, without reading it.

    Raises:
        UserError: it does not, or is of latents.
    """
    if text in SPLITS:
        _split(components, text)
    elif not to_path(text).exists():
        raise ConfigError(
            f"invalid {SETTING}={text!r}: no such folder or file; expected train, heldout, a folder of images"
            " or an npz file of images or statistics"
        )


def _split(components: Components, split: str) -> SourceImages:
    return SourceImages(components.train_source if split == "train" else components.heldout_source)


def _computed(
    images: Images,
    shape: Shape,
    networks: Networks,
    needs: Needs,
    collect: Collect,
    cache: Path | None,
) -> Reference:
    _check_shape(images.shape, shape, images.name)
    identity = _identity(images, networks, needs)
    cached: list[Reference] = []

    def find() -> bool:
        if cache is None or not cache.exists():
            return False
        try:
            cached.append(load_reference(cache, shape, networks, needs))
        except UserError:
            return False  # of other settings, or damaged: computed again
        return cached[0].description["identity"] == identity

    if on_process_0(find):
        return cached[0] if cached else Reference({}, {})
    collections = collect(images, networks, needs)
    features = {name: collection.feature_set() for name, collection in collections.items()}
    description = {"name": images.name, "images": len(images), "identity": identity}
    reference = Reference(features, description | {"hash": _hash(features)})
    if cache is not None and jax.process_index() == 0:
        save_reference(cache, reference, shape, networks)
    return reference


def _identity(images: Images, networks: Networks, needs: Needs) -> dict[str, Any]:
    """Return what computed features depend on, as JSON values."""
    return {
        "images": images.fingerprint,
        "count": len(images),
        "networks": {
            name: [network.weights_hash, network.preprocessing, sorted(needs[name].moments)]
            + [sorted(needs[name].rows)]
            for name, network in networks.items()
        },
    }


def save_reference(path: Path, reference: Reference, shape: Shape, networks: Networks) -> None:
    """Write a reference to an npz file, atomically."""
    about = {
        **reference.description,
        "shape": list(shape),
        "counts": {name: features.count for name, features in reference.features.items()},
        "networks": {name: [n.weights_hash, n.preprocessing] for name, n in networks.items()},
    }
    with replacing(path) as file:
        np.savez(file, reference=np.array(json.dumps(about)), **_arrays(reference.features))


def load_reference(path: Path, shape: Shape, networks: Networks, needs: Needs) -> Reference:
    """Read a file of `save_reference`.

    Raises:
        UserError: the file is damaged, or is of images of another shape or of other networks.
    """
    with _reading(path) as arrays:
        about = parse_object(str(arrays["reference"]))
        values = {name: arrays[name] for name in arrays.files if name != "reference"}
        stored_shape, counts = tuple(about["shape"]), about["counts"]
        features = {name: _features(name, count, values) for name, count in counts.items()}
    if _hash(features) != about["hash"]:
        raise UserError(f"damaged {path}: wrong checksum; delete it, and it is computed again")
    _check_shape(stored_shape, shape, str(path))
    for name, network in networks.items():
        got, expected = about["networks"].get(name), [network.weights_hash, network.preprocessing]
        if got != expected:
            raise ConfigError(
                f"{SETTING}={path} has features of {_network_text(name, got)}; expected"
                f" {_network_text(name, expected)}"
            )
        available = features[name].gaussians.keys() | features[name].rows.keys()
        missing = (needs[name].moments - features[name].gaussians.keys()) | (
            needs[name].rows - features[name].rows.keys()
        )
        if missing:
            raise ConfigError(
                f"{SETTING}={path} lacks {name} features {', '.join(sorted(missing))}: got"
                f" {', '.join(sorted(available))}; compute the reference again with the same scores"
            )
    return Reference({name: features[name] for name in networks}, about)


def _adm(
    path: Path, has_images: bool, shape: Shape, networks: Networks, needs: Needs, collect: Collect
) -> Reference:
    """Read statistics of ADM's evaluator, and compute features of its images where scores need them."""
    with _reading(path) as arrays:
        present = {name: pair for name, pair in _ADM.items() if set(pair) <= set(arrays.files)}
        values = {key: np.asarray(arrays[key], np.float64) for pair in present.values() for key in pair}
    gaussians = {
        name: _gaussian(path, name, values[mean], values[covariance], networks)
        for name, (mean, covariance) in present.items()
    }
    # Means and covariances of Inception are published; everything else is computed from the images.
    rest = {
        name: Outputs(frozenset() if name == "inception" else need.moments, need.rows)
        for name, need in needs.items()
    }
    rest = {name: need for name, need in rest.items() if need.names}
    collections = {}
    if rest:
        if not has_images:
            raise ConfigError(
                f"{SETTING}={path} has statistics but no images; scores of single images, such as kid, and"
                " DINOv2 need a reference with images"
            )
        images = NpzImages(path)
        _check_shape(images.shape, shape, images.name)
        collections = collect(images, {name: networks[name] for name in rest}, rest)
    features = {}
    for name in networks:
        computed = collections[name].feature_set() if name in collections else FeatureSet(0, {}, {})
        published = gaussians if name == "inception" else {}
        features[name] = dataclasses.replace(computed, gaussians={**computed.gaussians, **published})
    return Reference(features, {"name": f"{path} (ADM's statistics)", "hash": _hash(features)})


def _gaussian(
    path: Path, output: str, mean: np.ndarray, covariance: np.ndarray, networks: Networks
) -> Gaussian:
    length = networks["inception"].dimensions[output] if "inception" in networks else mean.size
    if (mean.shape, covariance.shape) != ((length,), (length, length)):
        raise UserError(
            f"invalid {' and '.join(_ADM[output])} in {path}: got shapes {mean.shape} and"
            f" {covariance.shape}; expected ({length},) and ({length}, {length})"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"invalid {' or '.join(_ADM[output])} in {path}: not finite; download it again")
    return Gaussian(mean, covariance)


def _check_shape(got: tuple[int, ...], expected: Shape, name: str) -> None:
    if tuple(got) != tuple(expected):
        raise ConfigError(
            f"{SETTING}: {name} has images of {_shape_text(got)}; expected {_shape_text(expected)} as the"
            " images to score"
        )


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"{'×'.join(map(str, shape[:2]))} px and {shape[2]} channel{'s' if shape[2] > 1 else ''}"


def _network_text(name: str, network: list[str] | None) -> str:
    return f"{name} with weights {network[0][:12]} ({network[1]})" if network else f"no {name}"


def _arrays(features: Mapping[str, FeatureSet]) -> dict[str, Any]:
    arrays = {}
    for network, one in features.items():
        for output, gaussian in one.gaussians.items():
            arrays[f"{network}/mean/{output}"] = gaussian.mean
            arrays[f"{network}/covariance/{output}"] = gaussian.covariance
        arrays |= {f"{network}/rows/{output}": rows for output, rows in one.rows.items()}
    return arrays


def _features(network: str, count: int, arrays: Mapping[str, np.ndarray]) -> FeatureSet:
    prefixes = [f"{network}/{kind}/" for kind in ("mean", "covariance", "rows")]
    means, covariances, rows = (
        {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        for prefix in prefixes
    )
    gaussians = {output: Gaussian(mean, covariances[output]) for output, mean in means.items()}
    return FeatureSet(count, gaussians, rows)


def _hash(features: Mapping[str, FeatureSet]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(_arrays(features).items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _names(path: Path) -> set[str]:
    """Return the names of the arrays in an npz file."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{SETTING}: damaged {path}: {one_line(error)}; expected an npz file") from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open an npz file. Whatever it holds, an error is one line."""
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            yield arrays
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"damaged {path}: {one_line(error, name_type=True)}; download it again") from error
