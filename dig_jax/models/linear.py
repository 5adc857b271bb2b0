"""The linear layer of all models, and its usual initialisation."""

from flax import nnx
from jaxtyping import Array, Float

xavier = nnx.initializers.xavier_uniform()


class Linear(nnx.Linear):
    """`nnx.Linear` over flattened tokens.

    With one contracted axis instead of two, XLA's CPU backend folds the transposed operand of the weight's
    gradient into the product; else it copies it, with all that it fuses into the copy. This made a train
    step 1.4 × faster.
    """

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """x·kernel + bias."""
        return super().__call__(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
