"""DiG (Zhu et al. 2025) in PyTorch, a peer of the comparison: its scans run on fla's kernels on a GPU.

As in the released code, the tokens are reversed after each block and transposed after every second one, so
that every block scans forward and its convolution acts in the turned image. Parameters have the names of
the released code. Without a GPU a plain recurrence takes the place of fla's kernels, to compare outputs.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.compare.pytorch_dit import DiT, modulate

_RANK, _NORMALIZER = 16, 16  # of the decay
FUSED = torch.cuda.is_available()  # use fla's kernels


def gla(q, k, v, g):
    """Return o [b, t, h, v] of q, k, g [b, t, h, k] and v [b, t, h, v], with the log-decay g."""
    if FUSED:
        from fla.ops.gla import chunk_gla

        return chunk_gla(q, k, v, g)[0]
    state, outputs = 0, []
    for q_t, k_t, v_t, g_t in zip(*(x.unbind(1) for x in (q * q.shape[-1] ** -0.5, k, v, g)), strict=True):
        state = g_t.exp()[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append((q_t[..., None] * state).sum(-2))
    return torch.stack(outputs, 1)


class GatedNorm(nn.Module):
    """RMSNorm(x)·weight·SiLU(gate) over the channels of a head, the plain form of fla's module."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x, gate):
        """Normalize x [b, t, h, v]."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps) * F.silu(gate)


def make_gated_norm(size):
    """Return fla's fused module, or the plain one without a GPU."""
    if not FUSED:
        return GatedNorm(size, eps=1e-6)
    from fla.modules import FusedRMSNormGated

    return FusedRMSNormGated(size, eps=1e-6)


class Mixer(nn.Module):
    """Gated linear attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        self.v_proj, self.g_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.gk_proj = nn.Sequential(nn.Linear(width, _RANK, bias=False), nn.Linear(_RANK, width // 2))
        self.g_norm_swish_gate = make_gated_norm(width // heads)

    def forward(self, x):
        """Mix tokens [b, t, d] from the first to the last."""
        names = ("q_proj", "k_proj", "v_proj", "g_proj", "gk_proj")
        q, k, v, gate, decay = (getattr(self, name)(x).unflatten(-1, (self.heads, -1)) for name in names)
        o = gla(q, k, v, F.logsigmoid(decay.float()) / _NORMALIZER)
        return self.o_proj(self.g_norm_swish_gate(o, gate).flatten(2))


class SwiGLU(nn.Module):
    """Fused linear layer of the gate and the hidden layer, then a linear layer, without biases."""

    def __init__(self, width):
        super().__init__()
        hidden = -(-(8 * width // 3) // 256) * 256
        self.gate_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        """Transform tokens."""
        gate, up = self.gate_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """A block with adaLN-Zero and a depthwise convolution, which has no residual."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, 1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = Mixer(width, heads), SwiGLU(width)
        self.dw_conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """Transform the tokens of square images under the condition c [b, d]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))
        side = int(x.shape[1] ** 0.5)
        return self.dw_conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)


class DiG(DiT):
    """The network, whose depth is a multiple of 4, without learned variance."""

    def __init__(self, **sizes):
        super().__init__(**sizes, block=Block)

    def run_blocks(self, x, c):
        """Transform tokens x [b, t, d] under the condition c [b, d]."""
        side = int(x.shape[1] ** 0.5)
        for number, block in enumerate(self.blocks):
            x = block(x, c).flip(1)
            if number % 2:
                x = x.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
        return x
