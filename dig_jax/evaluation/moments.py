"""Mean and covariance of a stream of feature vectors, and the Fréchet distance between two Gaussians."""

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Float64, Shaped


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of feature vectors."""

    mean: Float64[np.ndarray, " d"]
    covariance: Float64[np.ndarray, "d d"]

    @functools.cached_property
    def factor(self) -> Float64[np.ndarray, "r d"]:
        """R with RᵀR = covariance and as many rows as its rank.

        Eigenvalues below the rounding errors of the largest one count as 0: the roots of such errors would
        add up to a visible distance.
        """
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > 8 * len(values) * np.finfo(np.float64).eps * values.max(initial=0)
        return np.sqrt(values[kept])[:, None] * vectors.T[kept]


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter matrix Σ (x - mean)(x - mean)ᵀ of feature vectors, in float64.

    `a + b` are the moments of both sets (Chan, Golub and LeVeque 1979). Sums of x and xxᵀ would lose digits
    if the mean is large.

    Attributes:
        count: number n of vectors.
        mean: their mean; 0 if there are none.
        scatter: the scatter matrix, (n - 1) times the unbiased covariance.
    """

    count: int
    mean: Float64[np.ndarray, " d"]
    scatter: Float64[np.ndarray, "d d"]

    @classmethod
    def none(cls, length: int) -> "Moments":
        """Return the moments of an empty set of vectors of this length."""
        return cls(0, np.zeros(length), np.zeros((length, length)))

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> "Moments":
        """Return the moments of `features`, one vector each."""
        if not len(features):
            return cls.none(features.shape[1])
        mean = features.mean(0, dtype=np.float64)
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if not count:
            return self
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian with the mean and the unbiased covariance.

        Raises:
            ValueError: there are fewer than two vectors.
        """
        if self.count < 2:
            raise ValueError(f"too few vectors for a covariance: got {self.count}; expected at least 2")
        return Gaussian(self.mean, self.scatter / (self.count - 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the attributes as arrays to store."""
        return {name: np.asarray(value) for name, value in vars(self).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> "Moments":
        """Return the moments that `arrays` described."""
        return cls(int(arrays["count"]), np.asarray(arrays["mean"]), np.asarray(arrays["scatter"]))


def distance(a: Gaussian, b: Gaussian) -> float:
    """Return the squared 2-Wasserstein distance between Gaussians.

        |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½)

    (Dowson and Landau 1982; with Inception features this is the FID of Heusel et al. 2017, eq. 6). With
    Σ = RᵀR, the eigenvalues of Σa Σb are the squared singular values of Ra Rbᵀ. The trace of the root is
    therefore a sum of singular values, which stays accurate for singular covariances.

    Returns:
        The distance in squared units of the features; 0 for equal Gaussians.

    Raises:
        ValueError: the lengths of the vectors differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"feature lengths differ: got {len(a.mean)} and {len(b.mean)}; expected equal lengths"
        )
    cross = np.linalg.norm(a.factor @ b.factor.T, "nuc") if len(a.factor) and len(b.factor) else 0.0
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return max(0.0, float(np.sum((a.mean - b.mean) ** 2) + traces - 2 * cross))


def frechet_distance(a: Moments | Float[np.ndarray, "n d"], b: Moments | Float[np.ndarray, "m e"]) -> float:
    """Return the FID (Heusel et al. 2017): the `distance` between Gaussians fitted to two sets of features.

    Covariances are unbiased. The distance is in squared units of the features.

    The estimate has a positive bias. For n and m standard normal vectors of length d it is about
    d (1/n + 1/m) + d (d + 1) (1/n + 1/m)/4: compare only distances between sets of equal sizes.

    Args:
        a: at least two vectors, or the moments of as many.
        b: the same for vectors of the same length and in the same units.

    Raises:
        ValueError: a set has fewer than two vectors, or the lengths of the vectors differ.
    """
    first, second = (x if isinstance(x, Moments) else Moments.of(x) for x in (a, b))
    counts = first.count, second.count
    if min(counts) < 2:
        raise ValueError(f"too few vectors for a Fréchet distance: got {counts}; expected at least 2 per set")
    return distance(first.gaussian, second.gaussian)
