"""A Triton kernel of flash-linear-attention 0.6 that jax-triton can launch; needs both packages' Triton."""

import triton
import triton.language as tl
from fla.ops.gla.chunk import chunk_gla_fwd_kernel_o

# Below its heuristics and its autotuner.
kernel = chunk_gla_fwd_kernel_o
while not isinstance(kernel, triton.JITFunction):
    kernel = kernel.fn


@triton.jit
def output_last(q, v, g, h, A, T, o, scale: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """`kernel` in chunks of 64 tokens and one block of K and V, with its result where jax-triton puts it."""
    kernel(q, v, g, h, o, A, None, None, scale, T, H, H, K, V, 64, K, V, False, False)
