"""The interface of a score: a function of the features of generated and of reference images."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float
from numpy import ndarray

from dig_jax.evaluation.moments import Gaussian


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSet:
    """What scores need to know of a set of images: the outputs of one feature network.

    Attributes:
        count: number of images.
        gaussians: fitted to outputs of the network, by their names.
        rows: outputs of all images in order, by name. Published statistics may cover more images than rows.
    """

    count: int
    gaussians: Mapping[str, Gaussian]
    rows: Mapping[str, Float[ndarray, "n d"]]

    def gaussian(self, output: str) -> Gaussian:
        """Return the Gaussian of an output.

        Raises:
            ValueError: the set does not have it.
        """
        if output not in self.gaussians:
            raise ValueError(f"no mean and covariance of {output!r} features")
        return self.gaussians[output]

    def features(self, output: str, at_least: int) -> Float[ndarray, "n d"]:
        """Return the rows of an output.

        Raises:
            ValueError: the set does not have them, or has fewer than `at_least`.
        """
        if output not in self.rows:
            raise ValueError(f"no {output!r} features of single images; expected images, not only statistics")
        if len(self.rows[output]) < at_least:
            raise ValueError(f"too few images: got {len(self.rows[output])}; expected at least {at_least}")
        return self.rows[output]


@dataclasses.dataclass(frozen=True)
class Score(abc.ABC):
    """A score, with its protocol as attributes.

    Attributes:
        network: name of the feature network.
        output: the network's output that the score uses.
    """

    network: str = "inception"
    output: str = "pool"

    # Whether the score needs the features of single images, not only their mean and covariance.
    needs_rows: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    higher_is_better: ClassVar[bool] = False
    # Suffixes of the figures by which checkpoints can be compared.
    ranked: ClassVar[tuple[str, ...]] = ("",)

    @property
    @abc.abstractmethod
    def protocol(self) -> str:
        """What distinguishes this score from others of its name, in one line."""

    @abc.abstractmethod
    def __call__(self, generated: FeatureSet, reference: FeatureSet | None) -> dict[str, float]:
        """Return the figures by the suffix of their names; "" is the score itself.

        Args:
            generated: features of the images to score.
            reference: features of real images; None only if `needs_reference` is False.

        Raises:
            ValueError: too few images, or features that the set does not have.
        """

    def figure(self, name: str, suffix: str) -> str:
        """Return the name of a figure of the score called `name`."""
        return f"{name}_{suffix}" if suffix else name

    def ranks(self, name: str) -> list[str]:
        """Return the names of the figures by which checkpoints can be compared."""
        return [self.figure(name, suffix) for suffix in self.ranked]

    def figures(self, name: str, generated: FeatureSet, reference: FeatureSet | None) -> dict[str, float]:
        """Return the figures by their names, as a call does by their suffixes."""
        return {self.figure(name, key): value for key, value in self(generated, reference).items()}
