"""Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2), with ADM's conventions."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float

from dig_jax.evaluation.scores.score import FeatureSet, Score

# Rows and columns of distances computed at once: 50,000 images must not need copies of all features.
_ROWS, _COLUMNS = 250, 2000


@dataclasses.dataclass(frozen=True)
class PrecisionRecall(Score):
    """Precision is the fraction of generated images inside the manifold of the reference, recall the reverse.

    The manifold of a set is the union of balls around its vectors, each as large as the distance to the k-th
    nearest other vector of the set.

    Attributes:
        neighbors: k.
        half: compute distances in float16 as ADM does on GPUs. Blocks with overflow are computed in float32.
    """

    neighbors: int = 3
    half: bool = False
    higher_is_better = True
    ranked = ("precision", "recall")

    def figure(self, name: str, suffix: str) -> str:
        """Return "precision" or "recall", or the same of float16."""
        return f"{suffix}_float16" if self.half else suffix

    @property
    def protocol(self) -> str:
        """Number of neighbors, and precision of the distances."""
        precision = "float16 (ADM)" if self.half else "float64"
        return f"{self.neighbors} neighbors, all images of both sets, distances in {precision}"

    def __call__(self, generated: FeatureSet, reference: FeatureSet | None) -> dict[str, float]:
        """Return precision and recall."""
        assert reference is not None
        at_least = self.neighbors + 1
        real = reference.features(self.output, at_least)
        fake = generated.features(self.output, at_least)
        return {
            "precision": float(self._covered(fake, real).mean()),
            "recall": float(self._covered(real, fake).mean()),
        }

    def _covered(self, x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> Bool[np.ndarray, " n"]:
        """Return which vectors of x are inside the manifold of y."""
        radii = np.concatenate(
            [np.partition(block, self.neighbors, axis=1)[:, self.neighbors] for block in self._blocks(y, y)]
        )
        return np.concatenate([(block <= radii).any(1) for block in self._blocks(x, y)])

    def _blocks(
        self, x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
    ) -> Iterator[Float[np.ndarray, "rows m"]]:
        """Yield squared distances of some rows of x to all rows of y."""
        for first in range(0, len(x), _ROWS):
            tiles = range(0, len(y), _COLUMNS)
            block = x[first : first + _ROWS]
            yield np.concatenate([self._distances(block, y[j : j + _COLUMNS]) for j in tiles], axis=1)

    def _distances(
        self, x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]
    ) -> Float[np.ndarray, "n m"]:
        if not self.half:
            return squared_distances(x, y, np.float64)
        distances = squared_distances(x, y, np.float16)
        return distances if np.isfinite(distances).all() else squared_distances(x, y, np.float32)


def squared_distances(
    x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"], dtype: type[np.floating]
) -> Float[np.ndarray, "n m"]:
    """Return |x|² - 2 xy + |y|², each term rounded to `dtype`; products add up in float32 at least."""
    sums = np.promote_types(dtype, np.float32)
    x, y = (array.astype(dtype).astype(sums) for array in (x, y))
    with np.errstate(over="ignore", invalid="ignore"):  # float16, see `half`
        terms = [(x**2).sum(1)[:, None], -2 * (x @ y.T), (y**2).sum(1)]
        first, cross, last = (term.astype(dtype) for term in terms)
        return np.maximum(first + cross + last, dtype(0))
