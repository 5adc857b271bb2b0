"""Compute the cost of training every shipped config: the table in docs/configs.md.

    python benchmarks/costs.py

FLOPs are the model's own: matrix products, convolutions and recurrences of the forward pass, and twice
as many for the backward pass; no recomputation, elementwise operations or autoencoder. Hours assume one TPU
v5e chip at 40 % of its bfloat16 peak of 197 TFLOP/s; they are not measured.
"""

import functools
import pathlib
import runpy
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dig_jax import config  # noqa: E402
from dig_jax.components import Components, param_count  # noqa: E402
from dig_jax.data import ImageSpec  # noqa: E402
from dig_jax.hardware.model_flops import training_flops  # noqa: E402
from dig_jax.training.state import init_params  # noqa: E402

PAGE = ROOT / "docs" / "configs.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
CONFIGS = tuple(
    f"{family}_{size}:{resolution}"
    for family in ("dig", "dit")
    for size in ("s", "b", "l", "xl")
    for resolution in (256, 512, 1024)
) + ("cifar10", "celeba64", "celeba64:paper", "imagefolder", "imagefolder_latents")
# The image spec of each source, whose images need not be present; 10 classes for image folders.
_IMAGES = {"digits": (8, 1, 10), "imagefolder": (64, 3, 10), "imagefolder_latents": (32, 4, 10)}
V5E = 0.4 * 197e12  # flop/s
HEADER = (
    "| config | model | input | tokens | parameters | GFLOP per image | steps × batch | flops of the run |"
    " hours of a v5e |\n|---|---|---|---|---|---|---|---|---|\n"
)


class Cost(NamedTuple):
    """Of a config: its model, (height, width, channels), tokens, parameters, flops per image and in all."""

    model: str
    image_shape: tuple[int, int, int]
    tokens: int
    parameters: int
    flops_per_image: int
    steps: int
    batch_size: int

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.flops_per_image * self.steps * self.batch_size

    @property
    def hours(self) -> float:
        """Of one v5e chip."""
        return self.flops / V5E / 3600


def cost(name: str) -> Cost:
    """The cost of configs/NAME.py[:ARGUMENT,…]."""
    file, _, arguments = name.partition(":")
    get_config = runpy.run_path(str(ROOT / "configs" / f"{file}.py"))["get_config"]
    settings = config.from_dict(get_config(*filter(None, arguments.split(","))).to_dict())
    options = settings.data.options
    size, channels, classes = _IMAGES.get(
        file, (options.get("image_size"), options.get("channels", 3), options.get("num_classes"))
    )
    components = Components(settings, ImageSpec((size, size, channels), ("",) * classes))
    params = jax.eval_shape(functools.partial(init_params, components))
    image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    patch = settings.model.patch_size or int(settings.model.name.partition("/")[2])
    return Cost(
        settings.model.name,
        components.image_spec.image_shape,
        (size // patch) ** 2,
        param_count(params),
        training_flops(components.denoise, params, image, number, number),
        settings.training.steps,
        settings.data.batch_size,
    )


def _row(name: str) -> str:
    found = cost(name)
    cells = (
        f"`{name}`",
        found.model,
        " × ".join(map(str, found.image_shape)),
        f"{found.tokens:,}",
        f"{found.parameters:,}",
        f"{found.flops_per_image / 1e9:,.1f}",
        f"{found.steps:,} × {found.batch_size}",
        f"{found.flops:.1e}".replace("e+", "e"),
        f"{found.hours:,.0f}",
    )
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Computes all, and writes the table."""
    rows = []
    for name in CONFIGS:
        rows.append(_row(name))
        print(rows[-1], end="", flush=True)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + HEADER + "".join(rows) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
