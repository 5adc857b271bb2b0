"""Power-function averages of the parameters, and averages of other lengths made from them afterwards.

[K] is Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models" (EDM2), section
3 and appendix C. After t updates, the average of exponent γ weights the parameters θ(τ) after τ updates by
the profile [K 1]

    p(τ) = (γ + 1) τ^γ / t^(γ+1)     for 0 ≤ τ ≤ t,

whose width is the same fraction of the training at all times. Its length is the standard deviation of p,
divided by t [K 123]:

    length² = (γ + 1) / ((γ + 2)² (γ + 3)).

Stored averages with profiles pᵢ give an average of another length: Σ xᵢ (average i) has the profile Σ xᵢ pᵢ,
and the weights x minimize ∫ (Σ xᵢ pᵢ - p)², which is a linear system of the products [K algorithm 3]

    ∫ p_a p_b = (γ_a + 1)(γ_b + 1) m^(γ_a+γ_b+1) / ((γ_a + γ_b + 1) t_a^(γ_a+1) t_b^(γ_b+1)),
                                                                                        m = min(t_a, t_b).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dig_jax.config.averages import LONGEST


class Profile(NamedTuple):
    """The weights of an average after `updates` updates, by its relative length in (0, 0.288)."""

    updates: float
    length: float


@functools.cache
def exponent(length: float) -> float:
    """Return the exponent γ ≥ 0 of a relative length.

    Raises:
        ValueError: the length is not between 0 and 1/√12, its value at γ = 0.
    """
    if not 0 < length < LONGEST:
        raise ValueError(f"invalid length {length:g} of an average; expected between 0 and {LONGEST:.3f}")
    inverse = length**-2  # (γ + 2)² (γ + 3) = (γ + 1) / length²
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def combination(stored: Sequence[Profile], wanted: Profile) -> tuple[Float[np.ndarray, " n"], float]:
    """Return the weights of stored averages that make another one, and how well they do.

    Returns:
        The weights [n], and the error of the profile: √(∫(Σ xᵢ pᵢ - p)² / ∫p²), 0 for an exact result.
    """
    products = np.array([[_product(a, b) for b in stored] for a in stored])
    target = np.array([_product(a, wanted) for a in stored])
    # Neighboring profiles are almost equal. Unit norms and a cutoff keep the weights from exploding.
    norms = np.sqrt(np.diag(products))
    solution = np.linalg.lstsq(products / np.outer(norms, norms), target / norms, rcond=1e-12)[0] / norms
    norm = _product(wanted, wanted)
    error = max(norm - 2 * solution @ target + solution @ products @ solution, 0) / norm
    return solution, math.sqrt(error)


def _product(a: Profile, b: Profile) -> float:
    """Return ∫ p_a p_b."""
    if a.updates > b.updates:
        a, b = b, a
    first, second = exponent(a.length), exponent(b.length)
    ratio = (a.updates / b.updates) ** second
    return (first + 1) * (second + 1) * ratio / ((first + second + 1) * b.updates)
