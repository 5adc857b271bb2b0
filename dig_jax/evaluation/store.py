"""A file of the features that an interrupted evaluation has computed."""

import json
import logging
import time
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dig_jax.evaluation.collection import Collection, Collector, gathered
from dig_jax.files.atomic import replacing
from dig_jax.files.paths import Path, delete, local_copy
from dig_jax.parallel import on_process_0

log = logging.getLogger(__name__)

# Seconds between saves.
_SAVE_EVERY = 300.0


class Store:
    """A file of the features so far, with which an interrupted evaluation resumes.

    Process 0 writes the features of all processes, so that any number of processes can resume.

    Args:
        path: the file, possibly in object storage; only process 0 uses it.
        identity: what the features depend on; a file of another identity is ignored and replaced.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]):
        self._path, self._identity = path, json.dumps(identity, sort_keys=True)
        self._saved = time.monotonic()

    def load(self, collectors: Mapping[str, Collector]) -> int:
        """Give collectors what is stored, if it is of the same identity. All processes call it.

        Returns:
            The index of the first image that is missing.
        """
        stored = self._read() if jax.process_index() == 0 else {}
        known = on_process_0(lambda: {name: one.indices.tolist() for name, one in stored.items()})
        for name, indices in known.items():
            collectors[name].resume(np.array(indices, int), stored.get(name))
        return min(_first_missing(known.get(name, [])) for name in collectors)

    def _read(self) -> dict[str, Collection]:
        try:
            with local_copy(self._path) as copy, copy.open("rb") as file, np.load(file) as arrays:
                if str(arrays["identity"]) != self._identity:
                    return {}
                by_network: dict[str, dict[str, np.ndarray]] = {}
                for key in arrays.files:
                    network, _, name = key.partition(":")
                    if name:
                        by_network.setdefault(network, {})[name] = arrays[key]
            return {name: Collection.from_arrays(stored) for name, stored in by_network.items()}
        except FileNotFoundError:
            return {}
        except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile):
            log.warning("ignored a damaged %s", self._path)
            return {}

    def save_if_due(self, collectors: Mapping[str, Collector]) -> None:
        """Save the features of all processes if the last save was minutes ago. All processes call it."""
        if on_process_0(lambda: time.monotonic() - self._saved > _SAVE_EVERY):
            self.save({name: gathered(collector.collection) for name, collector in collectors.items()})

    def save(self, collections: Mapping[str, Collection]) -> None:
        """Save the features of all processes, atomically."""
        if jax.process_index():
            return
        arrays: dict[str, Any] = {
            f"{name}:{key}": value
            for name, collection in collections.items()
            for key, value in collection.arrays().items()
        }
        with replacing(self._path) as file:
            np.savez(file, identity=np.array(self._identity), **arrays)
        self._saved = time.monotonic()

    def delete(self) -> None:
        """Delete the file."""
        if jax.process_index() == 0:
            delete(self._path)


def _first_missing(indices: list[int]) -> int:
    """Return the first index that is missing."""
    present = np.sort(np.array(indices, int))
    gaps = np.flatnonzero(present != np.arange(len(present)))
    return int(gaps[0]) if len(gaps) else len(present)
