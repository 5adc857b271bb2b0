"""DiT (Peebles & Xie 2023) in PyTorch, as a rival to time: a program that another process commands.

It imports PyTorch and NumPy only, so that it runs in an environment of its own. Attention is PyTorch's
`scaled_dot_product_attention`, the optimizer is AdamW in its fused form, and names of parameters are those of
the released code, so that `dig_jax.convert` reads them.

    python benchmarks/compare/pytorch_dit.py '{"depth": 12, "width": 384, …}'

Each line of the input names what to run once: forward, train, sample, or save=FILE, which writes parameters,
inputs and the output as npz. Each line of the output has its seconds, of the wall and of the CPU.
"""

import copy
import json
import math
import sys
import time

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
        angles = t[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128))
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class Embedder(nn.Module):
    """A module under the name that the released code gives it."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


class DiT(nn.Module):
    """The network, without learned variance."""

    def __init__(self, depth, width, heads, side, channels=4, classes=1000, patch=2):
        super().__init__()
        self.channels, self.patch = channels, patch
        self.x_embedder = Embedder(proj=nn.Conv2d(channels, width, patch, patch))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = Embedder(embedding_table=nn.Embedding(classes + 1, width))
        self.pos_embed = nn.Parameter(torch.from_numpy(positions(side // patch, width))[None], False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
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
        for block in self.blocks:
            x = block(x, c)
        last = self.final_layer
        x = last.linear(modulate(last.norm(x), *last.adaLN_modulation(c).chunk(2, 1)))
        p = self.patch
        x = x.view(b, h // p, w // p, p, p, self.channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(b, self.channels, h, w)


def positions(side, width):
    """Return the fixed positions [side², width]: the column in the first half, the row in the second."""
    row, column = np.divmod(np.arange(side**2), side)
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    angles = [each[:, None] * frequencies for each in (column, row)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1).astype(np.float32)


class Rival:
    """A model with its optimizer, average and inputs."""

    def __init__(self, *, batch, steps, compiled=False, **sizes):
        torch.manual_seed(0)
        self.model, self.steps = DiT(**sizes), steps
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, weight_decay=0.0, fused=True)
        self.x = torch.randn(batch, self.model.channels, sizes["side"], sizes["side"])
        self.t, self.y = torch.full((batch,), 500.0), torch.arange(batch)
        self.network = torch.compile(self.model) if compiled else self.model

    @torch.no_grad()
    def forward(self):
        """Run the network once."""
        return self.network(self.x, self.t, self.y)

    def train(self):
        """Make a step of flow matching: loss, gradient, AdamW and average."""
        t, noise = torch.rand(len(self.x)), torch.randn_like(self.x)
        x_t = torch.lerp(self.x, noise, t[:, None, None, None])
        y = torch.where(torch.rand(len(self.y)) < 0.1, 1000, self.y)
        loss = F.mse_loss(self.network(x_t, 1000 * t, y), noise - self.x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1e-4)

    @torch.no_grad()
    def sample(self):
        """Draw a batch of images by Euler's method."""
        x, times = torch.randn_like(self.x), np.linspace(1, 0, self.steps + 1)
        for now, after in zip(times[:-1], times[1:], strict=True):
            x = x + (after - now) * self.network(x, torch.full((len(x),), 1000 * now), self.y)

    def save(self, path):
        """Write random parameters with their inputs and output."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.05)
        arrays = {name: value.numpy() for name, value in self.model.state_dict().items()}
        inputs = {"x": self.x.numpy(), "t": self.t.numpy(), "y": self.y.numpy()}
        output = self.forward().numpy()
        np.savez(path, **arrays, **{f"io/{k}": v for k, v in inputs.items()}, **{"io/output": output})


def main():
    """Run what the lines of the input name."""
    rival = Rival(**json.loads(sys.argv[1]))
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        phase, _, argument = line.strip().partition("=")
        wall, cpu = time.perf_counter(), time.process_time()
        getattr(rival, phase)(*filter(None, [argument]))
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
