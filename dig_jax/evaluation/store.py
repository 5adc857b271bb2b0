"""A file of the features that an interrupted evaluation has computed."""

import json
import logging
import pathlib
import time
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from dig_jax.evaluation.collection import Collection, Collector
from dig_jax.files.atomic import replacing

log = logging.getLogger(__name__)

# Seconds between saves.
_SAVE_EVERY = 300.0


class Store:
    """A file of the features so far, with which an interrupted evaluation resumes.

    Args:
        path: the file.
        identity: what the features depend on; a file of another identity is ignored and replaced.
    """

    def __init__(self, path: pathlib.Path, identity: Mapping[str, Any]):
        self._path, self._identity = path, json.dumps(identity, sort_keys=True)
        self._saved = time.monotonic()

    def load(self, collectors: Mapping[str, Collector]) -> int:
        """Give collectors what is stored, if it is of the same identity.

        Returns:
            The index of the first image that is missing.
        """
        for name, collection in self._read().items():
            collectors[name].collection = collection
        return min(_first_missing(collector.collection.indices) for collector in collectors.values())

    def _read(self) -> dict[str, Collection]:
        try:
            with self._path.open("rb") as file, np.load(file) as arrays:
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
        """Save if the last save was minutes ago."""
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save(collectors)

    def save(self, collectors: Mapping[str, Collector]) -> None:
        """Save now, atomically."""
        arrays: dict[str, Any] = {
            f"{name}:{key}": value
            for name, collector in collectors.items()
            for key, value in collector.collection.arrays().items()
        }
        with replacing(self._path) as file:
            np.savez(file, identity=np.array(self._identity), **arrays)
        self._saved = time.monotonic()

    def delete(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


def _first_missing(indices: Int[np.ndarray, " n"]) -> int:
    """Return the first index that is missing."""
    present = np.sort(indices)
    gaps = np.flatnonzero(present != np.arange(len(present)))
    return int(gaps[0]) if len(gaps) else len(present)
