"""The implementations of softmax attention that are compared.

The best one is JAX's splash attention on TPUs, and cuDNN's on GPUs. cuDNN cannot compile without its GPU, so
a program that is compiled without one gets JAX's Pallas kernel for GPUs, which needs the same memory.
"""

import collections
import contextlib
from collections.abc import Iterator

import jax
from jaxtyping import Array, Float

from benchmarks.compare.cases import Case
from dig_jax.hardware.chips import Chip
from dig_jax.models.mixers import softmax
from dig_jax.models.registry import resolve_options
from dig_jax.planning.planned_run import PlannedRun

# Matrix products of queries and keys, or of the like, in flash attention's forward and backward pass.
_FORWARD, _BACKWARD = 2, 5


@contextlib.contextmanager
def attention(case: Case, chip: Chip | None, *, absent: bool = True) -> Iterator[None]:
    """Trace a case with its implementation of softmax attention.

    Args:
        case: the case.
        chip: what the program is compiled for.
        absent: the chip is not there.
    """
    own = softmax._attend
    if case.attention == "plain":
        softmax._attend = _plain
    elif case.attention == "flash" and chip is not None and chip.network and absent:
        softmax._attend = _pallas
    try:
        yield
    finally:
        softmax._attend = own


def flops_without_estimate(run: PlannedRun, case: Case) -> collections.Counter[str]:
    """Return the FLOPs of flash attention in a program for GPUs, whose kernels state none."""
    if case.attention != "flash":
        return collections.Counter()
    m, sampling = run.settings.model, run.settings.sampling
    _, options = resolve_options(m.name, depth=m.depth, hidden_size=m.hidden_size)
    height, width, _ = run.components.image_spec.image_shape
    tokens = height * width // options.patch_size**2
    attentions = options.depth // (4 if case.model == "hybrid" else 1)
    if case.phase == "train":
        products = _FORWARD * (2 if m.remat in ("full", "block") else 1) + _BACKWARD
        images = case.images
    else:
        products = _FORWARD * sampling.steps
        images = 2 * case.images  # with and without the class
    return collections.Counter(bfloat16=products * 2 * images * attentions * tokens**2 * options.hidden_size)


def _plain(
    q: Float[Array, "b t h k"], k: Float[Array, "b t h k"], v: Float[Array, "b t h k"], axis_name: str | None
) -> Float[Array, "b t h k"]:
    assert axis_name is None
    return jax.nn.dot_product_attention(q, k, v)


def _pallas(
    q: Float[Array, "b t h k"], k: Float[Array, "b t h k"], v: Float[Array, "b t h k"], axis_name: str | None
) -> Float[Array, "b t h k"]:
    from jax.experimental.pallas.ops.gpu.attention import mha  # needs the compiler for GPUs

    assert axis_name is None
    return mha(q, k, v, segment_ids=None, sm_scale=q.shape[-1] ** -0.5)
