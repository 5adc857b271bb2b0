"""MIND, a sliced Wasserstein distance between features."""

import dataclasses

import numpy as np

from dig_jax.evaluation.scores.score import FeatureSet, Score

_AT_ONCE = 50  # directions projected at once


@dataclasses.dataclass(frozen=True)
class SlicedDistance(Score):
    """3 d times the mean squared difference of sorted projections on random unit vectors.

    A shift of each of the d features by s gives about 3 d s². Both sets must have equal numbers of
    images: of the larger one, equally spaced images are used.

    Attributes:
        directions: number of random directions.
        seed: of the directions.
    """

    directions: int = 1000
    seed: int = 0

    @property
    def protocol(self) -> str:
        """The features and directions."""
        return f"{self.network} {self.output!r} features, {self.directions} directions of seed {self.seed}"

    def __call__(self, generated: FeatureSet, reference: FeatureSet | None) -> dict[str, float]:
        """Return the distance, and the number of images used of each set."""
        assert reference is not None
        fake = generated.features(self.output, 1)
        real = reference.features(self.output, 1)
        count = min(len(fake), len(real))
        x, y = (rows[np.arange(count) * len(rows) // count] for rows in (fake, real))
        directions = np.random.default_rng(self.seed).standard_normal((x.shape[1], self.directions))
        directions = (directions / np.linalg.norm(directions, axis=0)).astype(x.dtype)
        total = 0.0
        for first in range(0, self.directions, _AT_ONCE):
            some = directions[:, first : first + _AT_ONCE]
            difference = np.sort(x @ some, axis=0) - np.sort(y @ some, axis=0)
            total += np.sum(difference**2, dtype=np.float64)
        return {"": 3 * x.shape[1] * float(total) / (count * self.directions), "images": count}
