"""Fréchet distances: FID (Heusel et al. 2017), sFID (Nash et al. 2021) and FD-DINOv2 (Stein et al. 2023)."""

import dataclasses

from dig_jax.evaluation.moments import distance
from dig_jax.evaluation.scores.score import FeatureSet, Score


@dataclasses.dataclass(frozen=True)
class FrechetDistance(Score):
    """The Fréchet distance between Gaussians fitted to an output of a network."""

    needs_rows = False

    @property
    def protocol(self) -> str:
        """The output, and how covariances are computed."""
        return f"Fréchet distance of {self.network} {self.output!r} features, unbiased covariances, float64"

    def __call__(self, generated: FeatureSet, reference: FeatureSet | None) -> dict[str, float]:
        """Return the distance, in squared units of the features."""
        assert reference is not None
        return {"": distance(generated.gaussian(self.output), reference.gaussian(self.output))}
