"""Features of a stream of images: computed on all devices, collected in any order, and merged.

The images are never in memory together. The moments are sums; features of single images, which some scores
need, take 8 kB per image and output of 2,048 numbers.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, Float32, Int, UInt8

from dig_jax.evaluation.features.network import FeatureNetwork
from dig_jax.evaluation.moments import Moments
from dig_jax.evaluation.scores import FeatureSet, Score
from dig_jax.parallel import BATCH_AXES, batch_sharding, gather_arrays, local_mesh, replicated

# Images per device and call, by platform. Fixed: batches of other sizes may round differently. A CPU gains
# nothing from large batches, which take memory.
_BATCH, _CPU_BATCH = 64, 8

# Images after which moments are updated: an update costs as much for 1 vector as for 1,000 of length 2,048.
_UPDATE_EVERY = 1024


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs of a network that scores need: as moments, and for single images."""

    moments: frozenset[str]
    rows: frozenset[str]

    @classmethod
    def of(cls, scores: Iterable[Score]) -> "Outputs":
        """Return what these scores need."""
        scores = list(scores)
        return cls(
            moments=frozenset(score.output for score in scores if not score.needs_rows),
            rows=frozenset(score.output for score in scores if score.needs_rows),
        )

    @property
    def names(self) -> frozenset[str]:
        """All outputs."""
        return self.moments | self.rows


class Collection:
    """Features of some images of a set.

    Attributes:
        indices: index in the set of each image.
        moments: moments of outputs by name.
        rows: parts of outputs by name, in the order of `indices`.
    """

    def __init__(
        self,
        indices: Int[np.ndarray, " n"],
        moments: Mapping[str, Moments],
        rows: Mapping[str, list[Float32[np.ndarray, "m d"]]],
    ):
        self.indices, self.moments, self.rows = indices, dict(moments), {k: list(v) for k, v in rows.items()}

    @classmethod
    def none(cls, outputs: Outputs, dimensions: Mapping[str, int]) -> "Collection":
        """Return an empty collection."""
        moments = {name: Moments.none(dimensions[name]) for name in outputs.moments}
        rows = {name: [np.zeros((0, dimensions[name]), np.float32)] for name in outputs.rows}
        return cls(np.zeros(0, np.int64), moments, rows)

    def __add__(self, other: "Collection") -> "Collection":
        return Collection(
            np.concatenate([self.indices, other.indices]),
            {name: a + other.moments[name] for name, a in self.moments.items()},
            {name: a + other.rows[name] for name, a in self.rows.items()},
        )

    def with_features(
        self, indices: Int[np.ndarray, " n"], features: Mapping[str, Float[np.ndarray, "n d"]]
    ) -> "Collection":
        """Return the collection with further images.

        Raises:
            ValueError: features that are not finite.
        """
        for name in sorted(self.moments.keys() | self.rows.keys()):
            bad = ~np.isfinite(features[name]).all(1)
            if bad.any():
                raise ValueError(
                    f"invalid {name!r} features of image {indices[bad][0]}: not finite; check the weights of"
                    " the feature network"
                )
        moments = {name: Moments.of(features[name]) for name in self.moments}
        rows = {name: [np.asarray(features[name], np.float32)] for name in self.rows}
        return self + Collection(indices, moments, rows)

    def feature_set(self) -> FeatureSet:
        """Return the features in the order of the images.

        Raises:
            ValueError: there are fewer than two images.
        """
        rows = {name: np.concatenate(parts) for name, parts in self.rows.items()}
        if (np.diff(self.indices) < 0).any():
            order = np.argsort(self.indices)
            rows = {name: values[order] for name, values in rows.items()}
        gaussians = {name: moments.gaussian for name, moments in self.moments.items()}
        return FeatureSet(len(self.indices), gaussians, rows)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything as arrays to store or to send."""
        arrays = {"indices": self.indices}
        for name, moments in self.moments.items():
            arrays |= {f"moments/{name}/{key}": value for key, value in moments.arrays().items()}
        return arrays | {f"rows/{name}": np.concatenate(parts) for name, parts in self.rows.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Collection":
        """Return the collection that `arrays` described.

        Raises:
            KeyError: an array is missing.
        """
        moments, rows = {}, {}
        for key in arrays:
            kind, _, name = key.partition("/")
            if kind == "rows":
                rows[name] = [arrays[key]]
            elif kind == "moments" and name.endswith("/count"):
                name = name.removesuffix("/count")
                fields = ("count", "mean", "scatter")
                moments[name] = Moments.from_arrays({key: arrays[f"moments/{name}/{key}"] for key in fields})
        return cls(arrays["indices"], moments, rows)


class Collector:
    """Computes features of images on this process's devices, in batches of a fixed size.

    The features of an image do not depend on how many images are added at once, or on the number of devices.

    Args:
        network: the feature network.
        outputs: which of its outputs to collect.
    """

    def __init__(self, network: FeatureNetwork, outputs: Outputs):
        self._mesh = local_mesh()
        self._outputs = outputs
        self._network = jax.device_put(network, replicated(self._mesh))
        platform = self._mesh.devices.flat[0].platform
        self._size = (_CPU_BATCH if platform == "cpu" else _BATCH) * self._mesh.size
        self._collection = Collection.none(outputs, network.dimensions)
        self._known = self._collection.indices
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._running: list[tuple[np.ndarray, dict[str, jax.Array]]] = []
        self._computed: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    @property
    def collection(self) -> Collection:
        """The features of all images that were added."""
        self._run(at_least=1)
        self._take()
        self._update(at_least=1)
        return self._collection

    def resume(self, known: Int[np.ndarray, " n"], collection: Collection | None) -> None:
        """Continue with the features of an interrupted evaluation, before images are added.

        Args:
            known: indices of the images that any process has the features of.
            collection: what this process has.
        """
        self._known = known
        if collection is not None:
            self._collection = collection

    def add(self, indices: Int[np.ndarray, " n"], images: UInt8[np.ndarray, "n h w c"]) -> None:
        """Add images, except those that were known at `resume`. Gray images become RGB.

        Args:
            indices: index in the set of each image.
            images: pixels with 1 or 3 channels, all of one size.

        Raises:
            ValueError: features that are not finite.
        """
        new = ~np.isin(indices, self._known)
        if new.any():
            self._waiting.append((indices[new], images[new]))
        self._run(at_least=self._size)
        self._update(at_least=_UPDATE_EVERY)

    def _run(self, at_least: int) -> None:
        """Start computing batches while there are so many images."""
        while sum(len(indices) for indices, _ in self._waiting) >= at_least:
            indices, images = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting = (
                [(indices[self._size :], images[self._size :])] if len(indices) > self._size else []
            )
            indices, images = indices[: self._size], images[: self._size]
            padded = images[np.minimum(np.arange(self._size), len(images) - 1)]
            if padded.shape[-1] == 1:
                padded = np.repeat(padded, 3, axis=-1)
            with jax.set_mesh(self._mesh):  # a train step may have set the mesh of all processes
                batch = jax.device_put(padded, batch_sharding(self._mesh))
                features = _features(self._network, batch, tuple(sorted(self._outputs.names)), self._mesh)
            self._take()  # the previous batch, while this one runs
            self._running.append((indices, features))

    def _take(self) -> None:
        for indices, features in self._running:
            arrays = {name: np.asarray(value)[: len(indices)] for name, value in features.items()}
            self._computed.append((indices, arrays))
        self._running = []

    def _update(self, at_least: int) -> None:
        """Add the computed features to the collection if there are so many."""
        if sum(len(indices) for indices, _ in self._computed) < at_least:
            return
        indices, features = zip(*self._computed, strict=True)
        joined = {name: np.concatenate([part[name] for part in features]) for name in features[0]}
        self._collection = self._collection.with_features(np.concatenate(indices), joined)
        self._computed = []


@functools.partial(jax.jit, static_argnames=("outputs", "mesh"))
def _features(
    network: FeatureNetwork, images: jax.Array, outputs: tuple[str, ...], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
    def shard(network: FeatureNetwork, images: jax.Array) -> dict[str, jax.Array]:
        features = network(images)
        return {name: features[name] for name in outputs}

    # Each device runs the same program for any number of devices; the partitioner might choose another.
    specs = (PartitionSpec(), PartitionSpec(BATCH_AXES))
    return jax.shard_map(
        shard, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(BATCH_AXES), check_vma=False
    )(network, images)


def merged(collections: Iterable[Collection]) -> Collection:
    """Return the union of collections of different images."""
    return functools.reduce(operator.add, collections)


def gathered(collection: Collection) -> Collection:
    """Return the union of the collections of all processes. All processes must call this."""
    if jax.process_count() == 1:  # without copies
        return collection
    return merged(map(Collection.from_arrays, gather_arrays(collection.arrays())))
