"""The interface of a network whose outputs scores compare."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Float, Shaped

# `check_images` checks the dtype and the number of channels.
Images = Shaped[jax.Array, "n height width c"]


@runtime_checkable
class FeatureNetwork(Protocol):
    """A pretrained network that maps images to feature vectors.

    A network is a pytree whose leaves are its weights, so pass it to a jitted function as an argument:
    `jax.jit(lambda network, images: network(images))(network, images)`. A closure would copy the weights into
    the program.

    Attributes:
        name: "inception", "dinov2_vitl14" or "dinov2_vitb14".
        weights_hash: SHA-256 of the weights in hexadecimal. It does not depend on the layout of the file.
        preprocessing: how images become inputs, in words. Features of different preprocessing are not
            comparable.
        dimensions: length of each kind of feature vector by name.
    """

    name: str
    weights_hash: str
    preprocessing: str

    @property
    def dimensions(self) -> Mapping[str, int]:
        """Length of each kind of feature vector by name."""
        ...

    def __call__(self, images: Images) -> dict[str, Float[jax.Array, "n d"]]:
        """Return float32 feature vectors by the names in `dimensions`.

        Args:
            images: RGB pixels, uint8 or float in 0…255, of any height and width.

        Raises:
            ValueError: images of another shape or dtype.
        """
        ...
