"""DiT (Peebles & Xie 2023) in PyTorch, a peer of the comparison.

Attention is PyTorch's `scaled_dot_product_attention`. Parameters have the names of the released code, so
that `dig_jax.convert` reads them. SiT has the same network; it computes a variance that it does not use.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


def modulate(x, shift, scale):
    """Return x·(1 + scale) + shift for tokens [b, t, d] and vectors [b, d]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head softmax attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        """Mix tokens [b, t, d]."""
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    """Linear, GELU (tanh), Linear."""

    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """Transform tokens."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """A block with adaLN-Zero."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, 1e-6, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads), MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """Transform tokens under the condition c [b, d]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class TimestepEmbedder(nn.Module):
    """256 features [cos, sin] of the timestep, then Linear, SiLU, Linear."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        """Embed timesteps [b]."""
        angles = t[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128, device=t.device))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class Embedder(nn.Module):
    """A module under the name that the released code gives it."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class DiT(nn.Module):
    """The network, without learned variance, of blocks made by `block(width, heads)`."""

    def __init__(self, depth, width, heads, side, channels=4, classes=1000, patch=2, block=Block):
        super().__init__()
        self.channels, self.patch = channels, patch
        self.x_embedder = Embedder(proj=nn.Conv2d(channels, width, patch, patch))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = Embedder(embedding_table=nn.Embedding(classes + 1, width))
        self.pos_embed = nn.Parameter(torch.from_numpy(positions(side // patch, width))[None], False)
        self.blocks = nn.ModuleList(block(width, heads) for _ in range(depth))
        self.final_layer = Embedder(
            linear=nn.Linear(width, patch**2 * channels),
            norm=nn.LayerNorm(width, 1e-6, elementwise_affine=False),
            adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width)),
        )

    def forward(self, x, t, y):
        """Return the prediction [b, c, h, w] for images [b, c, h, w], timesteps [b] and labels [b]."""
        b, _, h, w = x.shape
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        x = self.run_blocks(x, c)
        last = self.final_layer
        x = last.linear(modulate(last.norm(x), *last.adaLN_modulation(c).chunk(2, 1)))
        p = self.patch
        x = x.view(b, h // p, w // p, p, p, self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(b, self.channels, h, w)

    def run_blocks(self, x, c):
        """Transform tokens x [b, t, d] under the condition c [b, d]."""
        for block in self.blocks:
            x = block(x, c)
        return x


def positions(side, width):
    """Return the fixed positions [side², width]: the column in the first half, the row in the second."""
    row, column = np.divmod(np.arange(side**2), side)
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = [each[:, None] * frequencies for each in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)
