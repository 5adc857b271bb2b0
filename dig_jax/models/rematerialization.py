"""What a backward pass recomputes instead of keeping it."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jaxtyping import Array

from dig_jax.parallel import axis_sizes, save_all_but_gathered

Remat = Literal["dots", "full", "block"]
_REMAT_POLICIES: dict[Remat, Callable] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "block": jax.checkpoint_policies.nothing_saveable,
}


def rematerialized(function: Callable, remat: Remat | None) -> Callable:
    """Return the body of a scan over blocks, with what its backward pass recomputes (see `BlockStack`)."""
    if remat is None and not axis_sizes().keys() & {"fsdp", "tensor"}:
        return function
    policy = _REMAT_POLICIES[remat] if remat else save_all_but_gathered
    # Inside a scan the compiler cannot undo the recomputation, so barriers against CSE are not needed.
    return jax.checkpoint(function, policy=policy, prevent_cse=False)


def rematerialized_block(function: Callable, *, repeated: bool) -> Callable:
    """Return a function of one block (x, params, …) whose backward pass recomputes everything.

    A barrier on x and on the incoming gradient lets the recomputation wait for the gradient. Without it, the
    compiler recomputes several blocks at the same time, and keeps the activations of all of them.

    Args:
        function: the block.
        repeated: the program repeats the blocks instead of looping over them. Then the compiler may put off
            the parameters' gradients of all blocks, and keep the activations that they need, unless the
            gradient of x waits for them. In a loop, waiting only costs copies.
    """
    policy = jax.checkpoint_policies.nothing_saveable

    def run(x: Array, params: Any, *rest: Any) -> Any:
        if repeated:
            x, params = _with_joint_gradients(x, params)
        return function(x, params, *rest)

    return jax.checkpoint(run, policy=policy, prevent_cse=(True, False, False, False, False))


@jax.custom_jvp
def _with_joint_gradients(x: Array, params: Any) -> tuple[Array, Any]:
    """Return the arguments, whose gradients become available together."""
    return x, params


@_with_joint_gradients.defjvp
def _with_joint_gradients_jvp(primals: tuple, tangents: tuple) -> tuple:
    return primals, jax.lax.optimization_barrier(tangents)
