"""The kernel distance KID (Bińkowski et al. 2018)."""

import dataclasses

import numpy as np
from jaxtyping import Float

from dig_jax.evaluation.scores.score import FeatureSet, Score


@dataclasses.dataclass(frozen=True)
class KernelDistance(Score):
    """The squared maximum mean discrepancy with the kernel (xy/d + 1)³, unbiased, averaged over subsets.

    The expected value does not depend on the number of images, unlike a Fréchet distance.

    Attributes:
        subsets: number of random subsets.
        subset_size: images per subset, drawn without replacement; fewer if there are fewer images.
        seed: of the subsets; torch-fidelity draws the same ones.
    """

    subsets: int = 100
    subset_size: int = 1000
    seed: int = 2020

    @property
    def protocol(self) -> str:
        """The subsets."""
        return f"unbiased, cubic kernel, {self.subsets} subsets of up to {self.subset_size}, seed {self.seed}"

    def __call__(self, generated: FeatureSet, reference: FeatureSet | None) -> dict[str, float]:
        """Return mean and standard deviation over the subsets, and their size."""
        assert reference is not None
        fake = generated.features(self.output, 2)
        real = reference.features(self.output, 2)
        size = min(self.subset_size, len(fake), len(real))
        random = np.random.RandomState(self.seed)  # noqa: NPY002 (torch-fidelity's subsets)

        def subset(rows: np.ndarray) -> np.ndarray:
            return rows[random.choice(len(rows), size, replace=False)].astype(np.float64)

        values = [kernel_distance(subset(fake), subset(real)) for _ in range(self.subsets)]
        return {"": float(np.mean(values)), "std": float(np.std(values)), "subset_size": size}


def kernel_distance(x: Float[np.ndarray, "m d"], y: Float[np.ndarray, "n d"]) -> float:
    """Return the unbiased estimate of the squared distance (Gretton et al. 2012, eq. 3); it may be negative.

    Args:
        x, y: at least two vectors of features each.
    """
    m, n = len(x), len(y)

    def within(a: np.ndarray) -> float:
        values = _kernel(a, a)
        return (values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * _kernel(x, y).sum() / (m * n))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    values = x @ y.T / x.shape[1] + 1
    return values * values * values  # `**` is much slower
