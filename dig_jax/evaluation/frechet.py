"""The Fréchet distance between two sets of feature vectors, each taken for a Gaussian."""

import numpy as np
from jaxtyping import Float


def frechet_distance(features_a: Float[np.ndarray, "n d"], features_b: Float[np.ndarray, "m e"]) -> float:
    """Squared 2-Wasserstein distance of the Gaussians fitted to two sets of features.

        |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½)

    (Dowson and Landau 1982; the FID of Heusel et al. 2017, eq. 6, when d is Inception's), with the
    unbiased covariances and in float64. Writing Σ = RᵀR with R from a QR factorisation of the centred
    features, the eigenvalues of Σa Σb are the squared singular values of Ra Rbᵀ, so the trace of the root
    is a sum of singular values: nothing is squared and rooted again, also where a covariance is singular.

    With few samples the distance is too large (about in proportion to 1/n + 1/m): compare only equal sizes.

    Args:
        features_a: n ≥ 2 vectors.
        features_b: m ≥ 2 vectors of the same length, in the same units.

    Returns:
        The distance in squared units of the features; 0 for equal means and covariances.

    Raises:
        ValueError: for fewer than two vectors in a set, or vectors of different lengths.
    """
    counts = len(features_a), len(features_b)
    if min(counts) < 2:
        raise ValueError(f"a Fréchet distance needs 2 or more vectors on each side, got {counts}")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"features must have the same length, got {features_a.shape[1]} and {features_b.shape[1]}"
        )
    mean_a, root_a = _moments(features_a)
    mean_b, root_b = _moments(features_b)
    cross = np.linalg.norm(root_a @ root_b.T, "nuc")
    squared = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross
    return max(0.0, float(squared))


def _moments(
    features: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "r d"]]:
    """Mean, and R with RᵀR the covariance."""
    features = features.astype(np.float64)
    mean = features.mean(0)
    return mean, np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r")
