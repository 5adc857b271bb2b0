"""Guidance rules: how a stronger and a weaker prediction at the same x_t become one.

[H] is Ho & Salimans 2022 (classifier-free guidance), [K] Karras et al. 2024 (autoguidance), [A] Ahn et al.
2024 (perturbed-attention guidance), [Z] Fan et al. 2025 (CFG-Zero*), [P] Sadat et al. 2024 (adaptive
projected guidance).

With the predictions s (strong), u (weak) and the scale w, every rule is s at w = 1. The linear rules return

    u + w (s - u)                                                                                      [H 6]

and differ in the weak model: the null class [H], a less trained or smaller network [K], or the same network
with a perturbed mixer [A]. At fixed x_t and t, noise, x and velocity are affine functions of each other, so a
linear rule is the same in each of them. The other rules depend on inner products, and so on the space:

    cfg_zero   in velocities. The weak velocity is scaled by the least-squares factor c = ⟨s, u⟩/|u|² of u to
               s, then c u + w (s - c u); the velocity is zero at times above 1 - zero_init             [Z]
    apg        in predicted images. Δ = s - u, plus `momentum` times the Δ of the evaluation before, shrunk
               to norm `norm_cap` where it is greater, is split into Δ∥ along s and Δ⊥:
               s + (w - 1) (Δ⊥ + eta Δ∥)                                                                [P]

Inner products and norms are those of one image over its guided channels. So an image does not depend on the
batch around it.
"""

import abc
import dataclasses
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from dig_jax.diffusion.options import construct
from dig_jax.diffusion.process import Images
from dig_jax.errors import suggest

# Keeps images of zeros from dividing by zero.
_TINY = 1e-30

Space = Literal["output", "image", "velocity"]
Weak = Literal["null", "model", "perturbed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(abc.ABC):
    """A guidance rule with its options; a frozen dataclass, so that it can be a static argument of `jit`.

    Class attributes:
        space: what `combine` takes: the network's output as it is, predicted images, or velocities.
        weak: the weaker prediction: the null class, another model, or the same model with a perturbed mixer.
        zero_init: fraction of the process, from noise, in which the velocity is zero.
    """

    space: ClassVar[Space] = "output"
    weak: ClassVar[Weak] = "null"
    zero_init: ClassVar[float] = 0.0

    @property
    def remembers(self) -> bool:
        """Whether the rule uses the memory of `combine`."""
        return False

    @abc.abstractmethod
    def combine(
        self, strong: Images, weak: Images, scale: ArrayLike, memory: Images | None
    ) -> tuple[Images, Images | None]:
        """Return the guided prediction and the next memory.

        Args:
            strong: prediction of the model for the class [B, H, W, C].
            weak: the weaker prediction.
            scale: a number, or one per image of shape [B, 1, 1, 1].
            memory: images that this method returned at the evaluation before, at first zeros; None for rules
                without memory.
        """


class _Linear(Rule):
    def combine(
        self, strong: Images, weak: Images, scale: ArrayLike, memory: Images | None
    ) -> tuple[Images, Images | None]:
        """Return weak + scale · (strong - weak)."""
        return weak + scale * (strong - weak), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifierFree(_Linear):
    """Away from the null class [H 6]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoguidance(_Linear):
    """Away from a weaker model that knows the class too [K]."""

    weak: ClassVar[Weak] = "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perturbed(_Linear):
    """Away from the same model whose mixers let every token see only itself [A].

    Attributes:
        blocks: indices of the perturbed blocks; empty: all.
    """

    weak: ClassVar[Weak] = "perturbed"
    blocks: tuple[int, ...] = ()

    def __post_init__(self):
        if not all(type(block) is int and block >= 0 for block in self.blocks):
            raise ValueError(f"invalid blocks: got {list(self.blocks)}; expected indices of blocks")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CFGZero(Rule):
    """CFG-Zero*: away from the null class, scaled to fit the class [Z]. For flow matching.

    Attributes:
        zero_init: fraction of the process, from noise, in which the velocity is zero and the network is not
            evaluated.
    """

    space: ClassVar[Space] = "velocity"
    zero_init: float = 0.04  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self):
        if not 0 <= self.zero_init < 1:
            raise ValueError(
                f"invalid zero_init: got {self.zero_init}; expected a number from 0 to less than 1"
            )

    def combine(
        self, strong: Images, weak: Images, scale: ArrayLike, memory: Images | None
    ) -> tuple[Images, Images | None]:
        """Return c·weak + scale · (strong - c·weak)."""
        scaled = _projection(strong, weak)
        return scaled + scale * (strong - scaled), memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class APG(Rule):
    """Adaptive projected guidance: away from the null class, mostly across the prediction [P].

    Attributes:
        momentum: factor of the difference of the evaluation before; negative damps it.
        norm_cap: greatest norm of the difference of one image; None: no limit.
        eta: factor of the part of the difference along the prediction; with eta=1, momentum=0 and no
            norm_cap, APG is classifier-free guidance.
    """

    space: ClassVar[Space] = "image"
    momentum: float = -0.5
    norm_cap: float | None = None
    eta: float = 0.0

    def __post_init__(self):
        if not -1 < self.momentum < 1:
            raise ValueError(f"invalid momentum: got {self.momentum}; expected a number between -1 and 1")
        if self.norm_cap is not None and not self.norm_cap > 0:
            raise ValueError(f"invalid norm_cap: got {self.norm_cap}; expected a positive number or None")

    @property
    def remembers(self) -> bool:
        """Whether there is momentum."""
        return self.momentum != 0

    def combine(
        self, strong: Images, weak: Images, scale: ArrayLike, memory: Images | None
    ) -> tuple[Images, Images | None]:
        """Return strong + (scale - 1) · (Δ⊥ + eta Δ∥) and the difference with its momentum."""
        difference = strong - weak
        if memory is not None:
            difference = memory = difference + self.momentum * memory
        if self.norm_cap is not None:
            norm = jnp.sqrt(_inner(difference, difference))
            difference = difference * jnp.minimum(1, self.norm_cap / jnp.maximum(norm, _TINY))
        along = _projection(difference, strong)
        return strong + (scale - 1) * (difference - along + self.eta * along), memory


RULES: dict[str, type[Rule]] = {
    "classifier_free": ClassifierFree,
    "autoguidance": Autoguidance,
    "perturbed": Perturbed,
    "cfg_zero": CFGZero,
    "apg": APG,
}


def make_rule(name: str, **options: Any) -> Rule:
    """Return the rule of that name with these options.

    Raises:
        ValueError: the name is unknown, the rule has no such option, or an option is invalid.
    """
    if name not in RULES:
        raise ValueError(
            f"unknown guidance: got {name!r}; expected one of {', '.join(RULES)}{suggest(name, RULES)}"
        )
    return construct(RULES[name], options, f"guidance {name!r}")


def _projection(a: Images, onto: Images) -> Images:
    """Return the multiple of `onto` that is nearest to a, image by image."""
    return _inner(a, onto) / jnp.maximum(_inner(onto, onto), _TINY) * onto


def _inner(a: Images, b: Images) -> Float[Array, "b 1 1 1"]:
    return jnp.sum(a * b, axis=(1, 2, 3), keepdims=True)
