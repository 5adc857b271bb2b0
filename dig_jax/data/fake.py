"""Synthetic images of any size and number, computed from their index."""

import dataclasses
import functools

import numpy as np

from dig_jax.data.options import MAX_CLASSES, OptionError, image_shape
from dig_jax.data.source import SPLITS, Example, fingerprint

_BOUNDS = {"channels": (1, 1024), "num_classes": (0, MAX_CLASSES), "length": (1, 10**9), "seed": (0, 2**64)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeSource:
    """A checkerboard of waves for each class, with random phases, brightness and noise.

    Class k is a product of a vertical and a horizontal cosine whose frequencies enumerate k. The horizontal
    one is even about the center, so that a mirrored image keeps its class.
    """

    split: str
    image_shape: tuple[int, int, int]
    num_classes: int
    length: int
    seed: int
    name: str = "fake"
    flip: bool = True

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels as text."""
        return tuple(map(str, range(self.num_classes)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that the images depend on."""
        return fingerprint(self.name, self.split, self.image_shape, self.num_classes, self.length, self.seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is out of range for a source of {self.length} images")
        height, width, channels = self.image_shape
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        label = index % max(self.num_classes, 1)
        down, across = divmod(label, int(np.ceil(np.sqrt(max(self.num_classes, 1)))))
        phases = random.uniform(-1, 1, channels)
        rows = np.cos(np.pi * ((down + 1) * np.linspace(-1, 1, height)[:, None] + phases))  # [h, c]
        columns = np.cos(np.pi * (across + 1) / 2 * np.linspace(-1, 1, width)).astype(np.float32)
        wave = (random.uniform(60, 110) * rows[:, None]).astype(np.float32) * columns[:, None]
        noise = random.integers(0, 256, self.image_shape, np.uint8) >> 3
        return {"image": (111.5 + wave).astype(np.uint8) + noise, "label": np.int32(label)}


def fake(
    split: str,
    image_size: int | tuple[int, int] = 32,
    channels: int = 3,
    num_classes: int = 10,
    length: int = 1024,
    seed: int = 0,
    path: str = "",
) -> FakeSource:
    """Open synthetic images: `length` for training and a fifth as many held out.

    Args:
        split: "train" or "heldout".
        image_size: height and width in pixels, or one number for both.
        channels: channels per pixel.
        num_classes: image i has label i mod num_classes; 0: no classes.
        length: number of training images.
        seed: a different seed makes different images of the same classes.
        path: ignored; accepted so that the options of the `latents` source work here.

    Raises:
        ValueError: an invalid option.
    """
    del path
    values = {"channels": channels, "num_classes": num_classes, "length": length, "seed": seed}
    for option, (minimum, maximum) in _BOUNDS.items():
        if values[option] < minimum:
            raise OptionError("fake", option, values[option], f"at least {minimum}")
        if values[option] > maximum:
            raise OptionError("fake", option, values[option], f"at most {maximum:,}")
    return FakeSource(
        split=split,
        image_shape=image_shape("fake", image_size, channels),
        num_classes=num_classes,
        length=length if split == "train" else -(-length // 5),
        seed=seed,
    )
