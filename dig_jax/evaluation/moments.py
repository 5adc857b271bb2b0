"""Mean and covariance of feature vectors, and the Fréchet distance between two such Gaussians."""

import numpy as np
from jaxtyping import Float


def frechet_distance(features_a: Float[np.ndarray, "n d"], features_b: Float[np.ndarray, "m e"]) -> float:
    """Return the squared 2-Wasserstein distance between the Gaussians fitted to two sets of features.

        |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½)

    (Dowson and Landau 1982; with Inception features this is the FID of Heusel et al. 2017, eq. 6), with
    unbiased covariances, in float64. With Σ = RᵀR from a QR factorization of the centered features, the
    eigenvalues of Σa Σb are the squared singular values of Ra Rbᵀ. The trace of the root is therefore a sum
    of singular values, which stays accurate for singular covariances.

    The estimate has a positive bias of about 1/n + 1/m: compare only distances between sets of equal sizes.

    Args:
        features_a: n ≥ 2 vectors.
        features_b: m ≥ 2 vectors of the same length and in the same units.

    Returns:
        The distance in squared units of the features; 0 for equal means and covariances.

    Raises:
        ValueError: a set has fewer than two vectors, or the lengths of the vectors differ.
    """
    counts = len(features_a), len(features_b)
    if min(counts) < 2:
        raise ValueError(f"too few vectors for a Fréchet distance: got {counts}; expected at least 2 per set")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"feature lengths differ: got {features_a.shape[1]} and {features_b.shape[1]}; expected equal"
            " lengths"
        )
    mean_a, root_a = _moments(features_a)
    mean_b, root_b = _moments(features_b)
    cross = np.linalg.norm(root_a @ root_b.T, "nuc")
    squared = np.sum((mean_a - mean_b) ** 2) + np.sum(root_a**2) + np.sum(root_b**2) - 2 * cross
    return max(0.0, float(squared))


def _moments(
    features: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "r d"]]:
    """Return the mean, and R such that RᵀR is the covariance."""
    features = features.astype(np.float64)
    mean = features.mean(0)
    root = np.linalg.qr((features - mean) / np.sqrt(len(features) - 1), mode="r")
    return mean, np.asarray(root)
