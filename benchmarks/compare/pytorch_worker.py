"""A model in PyTorch, as a peer to time: a program that another process commands.

It imports PyTorch, NumPy and what its model needs, so that it runs in an environment of its own. It runs on
the first CUDA device if there is one. The optimizer is AdamW in its fused form. On GPUs, products are
bfloat16 by `torch.autocast`, and parameters are float32.

    python benchmarks/compare/pytorch_worker.py '{"network": "DiT", "depth": 12, "width": 384, …}'

Without arguments, it prints the device and the networks that can run. Each line of the input names what to
run once: forward, train, sample, or save=FILE, which writes parameters, inputs and the output as npz. Each
line of the output has its seconds, of the wall and of the CPU.
"""

import copy
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def networks():
    """Return what each network that can run here needs beside PyTorch, as a dict of package names."""
    needed = {"DiT": None, "diffusers": "diffusers"} | ({"DiG": "fla"} if DEVICE == "cuda" else {})
    return {name: package for name, package in needed.items() if not package or has(package)}


def has(package):
    """Return whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def make_network(name, **sizes):
    """Return a network by its name."""
    if name == "diffusers":
        from benchmarks.compare.pytorch_diffusers import DiffusersDiT as Network
    elif name == "DiG":
        from benchmarks.compare.pytorch_dig import DiG as Network
    else:
        from benchmarks.compare.pytorch_dit import DiT as Network
    return Network(**sizes)


class Peer:
    """A model with its optimizer, average and inputs."""

    def __init__(self, *, network, dtype, batch, steps, **sizes):
        torch.manual_seed(0)
        torch.set_default_device(DEVICE)
        self.model, self.steps = make_network(network, **sizes).to(DEVICE), steps
        self.dtype = getattr(torch, dtype)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, weight_decay=0.0, fused=True)
        self.x = torch.randn(batch, self.model.channels, sizes["side"], sizes["side"])
        self.t, self.y = torch.full((batch,), 500.0), torch.arange(batch)

    def predict(self, x, t, y):
        """Run the network; the output is float32."""
        with torch.autocast(DEVICE, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(x, t, y).float()

    @torch.no_grad()
    def forward(self):
        """Run the network once."""
        return self.predict(self.x, self.t, self.y)

    def train(self):
        """Make a step of flow matching: loss, gradient, AdamW and average."""
        t, noise = torch.rand(len(self.x)), torch.randn_like(self.x)
        x_t = torch.lerp(self.x, noise, t[:, None, None, None])
        y = torch.where(torch.rand(len(self.y)) < 0.1, 1000, self.y)
        loss = F.mse_loss(self.predict(x_t, 1000 * t, y), noise - self.x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1e-4)

    @torch.no_grad()
    def sample(self):
        """Draw a batch of images by Euler's method."""
        x, times = torch.randn_like(self.x), np.linspace(1, 0, self.steps + 1).tolist()
        for now, after in zip(times[:-1], times[1:], strict=True):
            x = x + (after - now) * self.predict(x, torch.full((len(x),), 1000 * now), self.y)

    def save(self, path):
        """Write random parameters with their inputs and output."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.05)
        arrays = self.model.state_dict() | {"io/x": self.x, "io/t": self.t, "io/y": self.y}
        arrays["io/output"] = self.forward()
        np.savez(path, **{name: value.cpu().numpy() for name, value in arrays.items()})


def main():
    """Run what the lines of the input name."""
    if len(sys.argv) == 1:
        print(json.dumps({"device": DEVICE, "networks": [*networks()]}))
        return
    options = json.loads(sys.argv[1])
    peer = Peer(**options)
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": DEVICE}
    package = networks().get(options["network"])
    versions = importlib.metadata.packages_distributions()
    about |= {package: importlib.metadata.version(versions[package][0])} if package else {}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        phase, _, argument = line.strip().partition("=")
        wall, cpu = time.perf_counter(), time.process_time()
        getattr(peer, phase)(*filter(None, [argument]))
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
