"""A Triton kernel of flash-linear-attention 0.6 in a form that jax-triton can launch."""

import triton
import triton.language as tl
from fla.ops.gla.chunk import chunk_gla_fwd_kernel_o

# Unwrap its heuristics and autotuner.
kernel = chunk_gla_fwd_kernel_o
while not isinstance(kernel, triton.JITFunction):
    kernel = kernel.fn


@triton.jit
def output_last(q, v, g, h, A, T, o, scale: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """Run `kernel` in chunks of 64 tokens and one block of K and V, with the output last."""
    kernel(q, v, g, h, o, A, None, None, scale, T, H, H, K, V, 64, K, V, False, False)
