"""What is compared: models, sizes, resolutions and phases, and the config of each case."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from configs import imagenet
from dig_jax import config
from dig_jax.planning.plan import without_data

# Label of a model → its name in a size, and the implementation of its softmax attention.
MODELS = {
    "DiG": ({"S": "DiG-S/2", "B": "DiG-B/2", "XL": "DiG-XL/2"}, None),
    "U-DiG": ({"S": "U-DiG-S", "B": "U-DiG-B", "XL": "U-DiG-XL"}, None),
    "DiS": ({"S": "DiS-384x24/2", "B": "DiS-768x26/2", "XL": "DiS-1152x64/2"}, None),
    "DiT": ({"S": "DiT-S/2", "B": "DiT-B/2", "XL": "DiT-XL/2"}, "flash"),
    "DiT, plain": ({"S": "DiT-S/2", "B": "DiT-B/2", "XL": "DiT-XL/2"}, "plain"),
    "hybrid": ({"S": "DiG-S/2", "B": "DiG-B/2", "XL": "DiG-XL/2"}, "flash"),
}
SIZES = ("S", "B", "XL")
PHASES = ("train", "sample", "meanflow")
# Models whose mixers have a derivative in forward mode, which a train step of MeanFlow needs.
_FORWARD_MODE = ("DiG", "U-DiG", "DiT, plain", "hybrid")
# Pixels of an image of 2,048 px, which every batch has: 64 images of 256 px, 16 of 512, 4 of 1,024. So all
# steps of a model have the same number of tokens. An image of 1,792 px is alone.
_PIXELS = 2048**2
SAMPLER_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compare.

    model: a label of `MODELS`.
    size: "S", "B" or "XL".
    pixels: height and width of the images; latents are an eighth of them.
    phase: "train", a train step, "sample", a guided step of DDPM, or "meanflow", a train step of MeanFlow.
    batch: images; None: as many as have the pixels of one image of 2,048 px.
    """

    model: str
    size: str
    pixels: int
    phase: str
    batch: int | None = None

    @property
    def images(self) -> int:
        """Images of a batch."""
        return self.batch or max(_PIXELS // self.pixels**2, 1)

    @property
    def name(self) -> str:
        """The case in words."""
        batch = f" batch={self.batch}" if self.batch else ""
        return f"{self.model} {self.size} {self.pixels} {self.phase}{batch}"

    @property
    def attention(self) -> str | None:
        """Implementation of softmax attention: "flash", the best of the device, "plain", or None."""
        return MODELS[self.model][1]

    def settings(self) -> config.Config:
        """Return the config: the recipe `ours` or `meanflow`, in bfloat16."""
        recipe = "meanflow" if self.phase == "meanflow" else "ours"
        c = imagenet.get_config(MODELS[self.model][0][self.size], "256", recipe)
        c.data.options.image_size = self.pixels // 8
        c.data.batch_size = c.sampling.batch_size = self.images
        c.sampling.steps = SAMPLER_STEPS
        # As in the recipe at this resolution; what is better for DiG.
        c.model.remat = "block" if self.pixels >= 1024 else "full"
        if self.size == "S" and self.phase == "sample" and not self.model.startswith("DiS"):
            c.model.mlp_parts = 2  # fits into a TPU's VMEM
        if self.size == "S" and self.phase == "train" and self.pixels >= 1024 and self.model != "DiS":
            c.model.scan_layers = False  # less memory (docs/guide/plan.md)
            if not self.model.startswith("DiT"):
                c.model.mlp_parts = 4
        if self.model == "hybrid":
            c.model.mixer = "gla*3+softmax"
        return without_data(config.from_dict(c.to_dict()))


def cases(
    models: Sequence[str],
    sizes: Sequence[str],
    pixels: Sequence[int],
    phases: Sequence[str],
    batch: int | None = None,
) -> Iterator[Case]:
    """Yield all combinations that there are."""
    for size, phase, number, model in itertools.product(sizes, phases, pixels, models):
        if phase != "meanflow" or model in _FORWARD_MODE:
            yield Case(model, size, number, phase, batch)
