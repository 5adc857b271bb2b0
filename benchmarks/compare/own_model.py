"""A model of this package, as the other side of pytorch_worker.py: the same commands, work and dtype.

python benchmarks/compare/own_model.py '{"model": "DiT-S/2", "dtype": "float32", "side": 32, "batch": 4, …}'
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.gpu_models import sampling_steps, train_steps  # noqa: E402
from configs import imagenet  # noqa: E402
from dig_jax import config, runtime  # noqa: E402
from dig_jax.convert import load_torch_state_dict  # noqa: E402
from dig_jax.convert.diffusers import as_upstream  # noqa: E402
from dig_jax.files.safetensors import StoredArray  # noqa: E402
from dig_jax.models.registry import create_model  # noqa: E402
from dig_jax.planning.plan import without_data  # noqa: E402
from dig_jax.planning.planned_run import PlannedRun, lower_sampler, lower_train_step  # noqa: E402
from dig_jax.planning.topology import THIS, find_topology  # noqa: E402
from dig_jax.training.state import init_params  # noqa: E402


def settings(model: str, side: int, batch: int, steps: int, dtype: str) -> config.Config:
    """Return the config of the same work: flow matching, AdamW, one average, Euler's method."""
    c = imagenet.get_config(model, "256", "ours")
    c.data.options.image_size = side
    c.data.batch_size = c.sampling.batch_size = batch
    c.model.dtype, c.model.learn_sigma = dtype, False
    # What is fastest. On a CPU, recomputing DiG's blocks at 1,024 px costs less than keeping activations.
    is_cpu = jax.default_backend() == "cpu"
    recomputes = is_cpu and side >= 128 and model.startswith("DiG")
    c.model.remat, c.model.scan_layers = ("block", True) if recomputes else ("none", False)
    c.diffusion.process = "flow"
    c.diffusion.times = "uniform"
    c.sampling.sampler, c.sampling.steps, c.sampling.guidance_scale = "euler", steps, 1.0
    return without_data(config.from_dict(c.to_dict()))


class Own:
    """A model whose programs are compiled when they are first run."""

    def __init__(self, **options: Any):
        self.run = PlannedRun.of(settings(**options), find_topology(THIS))
        self.ready: dict[str, Callable[[], object]] = {}

    def forward(self) -> Callable[[], object]:
        """Return a function that runs the network once."""
        components, batch = self.run.components, self.run.settings.data.batch_size
        params = jax.jit(lambda: init_params(components))()
        x = jax.random.normal(jax.random.key(0), (batch, *components.image_spec.image_shape))
        t, y = jnp.full(batch, 500.0), jnp.arange(batch)
        denoise = jax.jit(components.denoise)
        return lambda: jax.block_until_ready(denoise(params, x, t, y))

    def train(self) -> Callable[[], object]:
        """Return a function that makes a train step."""
        steps = train_steps(lower_train_step(self.run).compile(), self.run)
        steps(1)
        return lambda: steps(1)

    def sample(self) -> Callable[[], object]:
        """Return a function that draws a batch of images."""
        steps = sampling_steps(lower_sampler(self.run).compile(), self.run)
        return lambda: steps(1)

    def __call__(self, phase: str) -> None:
        """Run a phase once."""
        if phase not in self.ready:
            self.ready[phase] = getattr(self, phase)()
        self.ready[phase]()


def difference(path: str, model: str, dtype: str) -> float:
    """Return the greatest difference between our output and that in a file of pytorch_worker.py's `save`.

    It is relative to the greatest output. The file has upstream's or diffusers' names.
    """
    import flax.nnx as nnx

    arrays = dict(np.load(path))
    x, t, y, expected = (jnp.asarray(arrays.pop(f"io/{name}")) for name in ("x", "t", "y", "output"))
    x, expected = (each.transpose(0, 2, 3, 1) for each in (x, expected))
    options = {"input_size": x.shape[1:3], "num_classes": 1000, "learn_sigma": False, "dtype": dtype}
    own = create_model(model, **options, rngs=nnx.Rngs(0))
    stored = {name: StoredArray(x.shape, "float32", lambda x=x: x) for name, x in arrays.items()}
    upstream = {name: array.read() for name, array in as_upstream(stored).items()}
    output = load_torch_state_dict(own, upstream)(x, t, y)
    return float(np.abs(output - expected).max() / np.abs(expected).max())


def main() -> None:
    """Run what the lines of the input name."""
    runtime.set_numerics()
    runtime.prepare_cpu(1)
    options = json.loads(sys.argv[1])
    own = Own(**options)
    print(json.dumps({"jax": jax.__version__, "device": jax.devices()[0].device_kind}), flush=True)
    for line in sys.stdin:
        phase, _, argument = line.strip().partition("=")
        if phase == "check":
            found = difference(argument, options["model"], options["dtype"])
            print(json.dumps({"difference": found}), flush=True)
            continue
        wall, cpu = time.perf_counter(), time.process_time()
        own(phase)
        found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
