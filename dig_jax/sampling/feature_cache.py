"""Feature caching: most steps predict what mixers and MLPs add to the tokens instead of computing it.

Every `interval`-th evaluation is a full one. Between full evaluations, the outputs of all mixers and MLPs are
extrapolated from the last full evaluations (the idea of TaylorSeer, Liu et al. 2025). Embeddings,
modulation, gates, convolutions and the final layer run at every step.

TaylorSeer takes differences for derivatives, which misses polynomials of degree 2. Newton's backward form is
exact for polynomials of degree `order` in the index of the evaluation. With the features f of the full
evaluations and the backward differences

    ∇⁰ = f,   ∇ⁱ⁺¹ = ∇ⁱ - (∇ⁱ of the full evaluation before)

the features j evaluations after the last full one are, with s = j/interval,

    Σ_i ∇ⁱ · s (s + 1) … (s + i - 1)/i!

Order 0 reuses the features. At the start, the order is limited by the number of full evaluations.

A cache belongs to one network and one batch. Guidance by the null class evaluates both classes in one batch
of twice the size, so that each prediction has its own history. A range of time with another denoiser starts
anew.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dig_jax.diffusion.piecewise import AnyDenoiser, Piecewise, Remembering, Session
from dig_jax.diffusion.process import Denoiser, Images
from dig_jax.models.backbone import Outputs

Evaluate = Callable[..., Outputs]
"""(x, t, y, features=) -> outputs, as `ModelSpec.outputs` without parameters."""


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Static description of feature caching.

    Attributes:
        interval: evaluations from one full evaluation to the next.
        order: degree of the extrapolation; 0 reuses features. Memory grows with order + 1.
    """

    interval: int
    order: int


class CachedModel:
    """A network whose `memory` the loop of a sampler sets and reads around each evaluation."""

    def __init__(self, evaluate: Evaluate, spec: CacheSpec):
        self.evaluate, self.spec = evaluate, spec
        self.memory: Any = None

    def _start(self, x: Array, t: Array, y: Array) -> Any:
        features = jax.eval_shape(lambda: self.evaluate(x, t, y, features="keep").features)
        differences = jax.tree.map(
            lambda leaf: jnp.zeros((self.spec.order + 1, *leaf.shape), leaf.dtype), features
        )
        return jnp.int32(0), differences

    def __call__(self, x: Array, t: Array, y: Array) -> tuple[Array, Array | None]:
        """Return the prediction and the prediction of the internal head."""
        evaluation, differences = self._start(x, t, y) if self.memory is None else self.memory
        interval = self.spec.interval
        since = evaluation % interval

        def full(differences: Any) -> tuple[tuple[Array, Array | None], Any]:
            outputs = self.evaluate(x, t, y, features="keep")
            return (outputs.output, outputs.internal), jax.tree.map(updated, differences, outputs.features)

        def cached(differences: Any) -> tuple[tuple[Array, Array | None], Any]:
            seen = evaluation // interval + 1

            def predicted(leaf: Array) -> Array:
                return extrapolated(leaf, since.astype(jnp.float32) / interval, seen)

            outputs = self.evaluate(x, t, y, features=jax.tree.map(predicted, differences))
            return (outputs.output, outputs.internal), differences

        predictions, differences = jax.lax.cond(since == 0, full, cached, differences)
        self.memory = evaluation + 1, differences
        return predictions


def with_caches(denoiser: AnyDenoiser, caches: Sequence[CachedModel]) -> AnyDenoiser:
    """Return a denoiser that remembers the caches of the networks that it evaluates."""
    if not caches:
        return denoiser
    if isinstance(denoiser, Piecewise):
        parts = tuple(_remembering(part, caches) for part in denoiser.denoisers)
        return Piecewise(parts, denoiser.bounds)
    return _remembering(denoiser, caches)


def _remembering(denoiser: Denoiser | Remembering, caches: Sequence[CachedModel]) -> Remembering:
    session = Session(denoiser)

    def evaluate(x: Images, t: Array, memory: Any) -> tuple[Array, Any]:
        session.memory, states = memory
        for cache, state in zip(caches, states, strict=True):
            cache.memory = state
        output = session(x, t)
        return output, (session.memory, tuple(cache.memory for cache in caches))

    def start(x: Images) -> Any:
        def after_one(x: Images, t: Array) -> Any:
            return evaluate(x, t, (session.start(x), (None,) * len(caches)))[1]

        memory = jax.eval_shape(after_one, x, jnp.zeros(x.shape[:1], jnp.int32))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), memory)

    return Remembering(evaluate, start)


def updated(differences: Float[Array, "n ..."], features: Float[Array, "..."]) -> Float[Array, "n ..."]:
    """Return the backward differences after a full evaluation, from those after the one before."""
    rows = [features.astype(jnp.float32)]
    for before in differences[:-1]:
        rows.append(rows[-1] - before)
    return jnp.stack(rows).astype(differences.dtype)


def extrapolated(
    differences: Float[Array, "n ..."], s: Float[Array, ""], seen: Int[Array, ""]
) -> Float[Array, "..."]:
    """Return the features s intervals after the last full evaluation, out of `seen` full ones."""
    total, weight = jnp.zeros(differences.shape[1:], jnp.float32), jnp.float32(1)
    for i, difference in enumerate(differences):
        total += jnp.where(i < seen, weight, 0) * difference
        weight *= (s + i) / (i + 1)
    return total.astype(differences.dtype)
