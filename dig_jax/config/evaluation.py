"""The fields of `evaluation`, as in `fields.py`."""

import dataclasses

from dig_jax.config.field import Group, field


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Group, path="config.evaluation"):
    """Scores of generated images (docs/guide/scores.md)."""

    num_images: int = field(
        500,
        "Number of generated images to score; 0: no scores. Fréchet distances of different numbers cannot be"
        " compared; papers report 50,000.",
        bounds="nonnegative",
    )
    scores: str = field(
        "",
        "Scores by features of a network, separated by commas, such as fid,sfid,is,precision_recall,kid"
        " (docs/guide/scores.md). The digits have scores of their own.",
    )
    reference: str = field(
        "train",
        "Real images to compare with: train, heldout, a folder of images, or an npz file of images or of"
        " statistics, such as VIRTUAL_imagenet256_labeled.npz of ADM.",
    )
    every_steps: int | None = field(
        None,
        "Steps between scores in training; 0: only at the end. `checkpoint.keep_best_by` can use them.",
        none=0,
        bounds="positive",
    )
    labels: str = field(
        "balanced",
        "Classes of the images to score: balanced (seed modulo the number of classes) or random (uniform).",
        choices=("balanced", "random"),
    )
    inception_weights: str | None = field(
        None, "File or Hub name of the weights of Inception; empty: none.", none=""
    )
    dinov2_weights: str | None = field(
        None, "File or Hub name of the weights of DINOv2 ViT-L/14; empty: none.", none=""
    )

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names in `scores`."""
        return tuple(name.strip() for name in self.scores.split(",") if name.strip())
