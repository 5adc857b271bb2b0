"""Computed cost of training each config: writes the table in docs/reference/configs.md.

    python benchmarks/costs.py

FLOPs are model FLOPs: matrix products, convolutions and recurrences of the forward pass, and twice as many
for the backward pass. Rematerialization, elementwise operations and the autoencoder do not count. Hours
assume one TPU v5e chip at 40 % of its bfloat16 peak of 197 teraFLOP/s; nothing was measured.
"""

import dataclasses
import functools
import pathlib
import runpy
import sys

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dig_jax import config  # noqa: E402
from dig_jax.components import Components, Params, model_options, param_count  # noqa: E402
from dig_jax.data import ImageSpec  # noqa: E402
from dig_jax.hardware.model_flops import training_flops  # noqa: E402
from dig_jax.training.state import init_params  # noqa: E402

PAGE = ROOT / "docs" / "configs.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
_SIZES = {"dig": "s b l xl", "udig": "s b l xl", "dit": "s b l xl", "dis": "s b m l h xl"}
CONFIGS = tuple(
    f"{family}_{size}:{resolution}"
    for family, sizes in _SIZES.items()
    for size in sizes.split()
    for resolution in (256, 512, 1024)
) + ("cifar10", "celeba64", "celeba64:paper", "imagefolder", "imagefolder_latents")
# Image size, channels and classes of sources whose configs do not state them; 10 classes for image folders.
_IMAGES = {"digits": (8, 1, 10), "imagefolder": (64, 3, 10), "imagefolder_latents": (32, 4, 10)}
V5E = 0.4 * 197e12  # FLOP/s
HEADER = (
    "| config | model | input | tokens | parameters | GFLOP per image | steps × batch | FLOPs of the run |"
    " hours of a v5e |\n|---|---|---|---|---|---|---|---|---|\n"
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of training one config."""

    components: Components
    params: Params  # shapes and dtypes

    @property
    def tokens(self) -> int:
        """Number of tokens per image."""
        height, width, _ = self.components.image_spec.image_shape
        return height * width // model_options(self.components.config.model)[1].patch_size ** 2

    @functools.cached_property
    def flops_per_image(self) -> int:
        """Model FLOPs of training on one image."""
        image = jax.ShapeDtypeStruct((1, *self.components.image_spec.image_shape), jnp.float32)
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        return training_flops(self.components.denoise, self.params, image, number, number)

    @property
    def flops(self) -> int:
        """Model FLOPs of the run."""
        settings = self.components.config
        return self.flops_per_image * settings.training.steps * settings.data.batch_size

    @property
    def hours(self) -> float:
        """Hours of the run on one v5e chip."""
        return self.flops / V5E / 3600


def cost(name: str) -> Cost:
    """Return the cost of configs/NAME.py[:ARGUMENT,…]."""
    file, _, arguments = name.partition(":")
    get_config = runpy.run_path(str(ROOT / "configs" / f"{file}.py"))["get_config"]
    settings = config.from_dict(get_config(*filter(None, arguments.split(","))).to_dict())
    options = settings.data.options
    if file in _IMAGES:
        size, channels, classes = _IMAGES[file]
    else:
        size, channels, classes = options["image_size"], options.get("channels", 3), options["num_classes"]
    components = Components(settings, ImageSpec((size, size, channels), ("",) * classes))
    return Cost(components, jax.eval_shape(functools.partial(init_params, components)))


def _row(name: str) -> str:
    found = cost(name)
    settings = found.components.config
    cells = (
        f"`{name}`",
        settings.model.name,
        " × ".join(map(str, found.components.image_spec.image_shape)),
        f"{found.tokens:,}",
        f"{param_count(found.params):,}",
        f"{found.flops_per_image / 1e9:,.1f}",
        f"{settings.training.steps:,} × {settings.data.batch_size}",
        f"{found.flops:.1e}".replace("e+", "e"),
        f"{found.hours:,.0f}",
    )
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Write the table of all configs."""
    rows = []
    for name in CONFIGS:
        rows.append(_row(name))
        print(rows[-1], end="", flush=True)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + HEADER + "".join(rows) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
