"""The Inception Score (Salimans et al. 2016), exp(E KL(p(y|x) ‖ p(y))), as ADM and torch-fidelity compute it.

The two differ in how they split the images, so their figures differ: say which one is reported.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from dig_jax.evaluation.scores.score import FeatureSet, Score


@dataclasses.dataclass(frozen=True)
class InceptionScore(Score):
    """The mean over splits of the images, computed from logits without bias.

    Attributes:
        split_size: images per split, in the order of the images (ADM: 5,000); 0: `splits` decides.
        splits: number of equal splits of shuffled images (torch-fidelity: 10).
        seed: of the permutation.
    """

    output: str = "logits"
    split_size: int = 0
    splits: int = 10
    seed: int = 2020
    needs_reference = False
    higher_is_better = True

    @property
    def protocol(self) -> str:
        """How the images are split."""
        if self.split_size:
            return f"mean over splits of {self.split_size} images in order (ADM)"
        return f"mean over {self.splits} splits, permutation of seed {self.seed} (torch-fidelity)"

    def __call__(self, generated: FeatureSet, reference: FeatureSet | None) -> dict[str, float]:
        """Return mean and standard deviation over the splits."""
        logits = generated.features(self.output, 1 if self.split_size else self.splits)
        if self.split_size:
            parts = [logits[i : i + self.split_size] for i in range(0, len(logits), self.split_size)]
        else:
            shuffled = logits[np.random.RandomState(self.seed).permutation(len(logits))]  # noqa: NPY002
            bounds = [i * len(logits) // self.splits for i in range(self.splits + 1)]
            parts = [shuffled[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
        scores = [inception_score(part) for part in parts]
        return {"": float(np.mean(scores)), "std": float(np.std(scores))}


def inception_score(logits: Float[np.ndarray, "n classes"]) -> float:
    """Return the score of one split, in float64: from 1 to the number of classes."""
    shifted = logits - logits.max(1, keepdims=True).astype(np.float64)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(0)
    # A class that no image has contributes nothing: its p is 0 everywhere.
    log_marginal = np.log(np.where(marginal > 0, marginal, 1))
    return float(np.exp(np.mean(np.sum(p * (log_p - log_marginal), axis=1))))
