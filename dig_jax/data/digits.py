"""Scikit-learn's handwritten digits, a data set that needs no download."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from dig_jax.data.options import OptionError
from dig_jax.data.source import Example, fingerprint

_SIZE = 8  # pixels of the published images
_LARGEST = 256
_HELDOUT_PER_CLASS = 36


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource:
    """Images and labels in memory."""

    name: str
    split: str
    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]
    flip: bool

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of images and labels."""
        return fingerprint(
            self.name, self.split, self.image_shape, self.images.tobytes(), self.labels.tobytes()
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}


@functools.cache
def digits(split: str, image_size: int = _SIZE) -> ArraySource:
    """Open the digits, 8×8 gray: 1,437 for training and 360 (36 per class) held out.

    They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI
    repository), rescaled from 0…16 to 0…255. The split separates images, not writers. A mirrored digit is
    not a digit, so they are never flipped.

    Args:
        split: "train" or "heldout".
        image_size: height and width, a multiple of 8; larger images are enlarged by bicubic interpolation.

    Raises:
        OptionError: an invalid size.
    """
    from sklearn.datasets import load_digits

    if image_size not in range(_SIZE, _LARGEST + 1, _SIZE):
        raise OptionError("digits", "image_size", image_size, f"a multiple of {_SIZE}, at most {_LARGEST}")
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    heldout = _stratified_choice(labels, _HELDOUT_PER_CLASS)
    chosen = heldout if split == "heldout" else ~heldout
    images, labels = _enlarge(images[chosen], image_size), labels[chosen]
    images.setflags(write=False)
    labels.setflags(write=False)
    return ArraySource(
        name="digits",
        split=split,
        images=images,
        labels=labels,
        class_names=tuple("0123456789"),
        flip=False,
    )


def _enlarge(images: UInt8[np.ndarray, "n 8 8 1"], size: int) -> UInt8[np.ndarray, "n size size 1"]:
    if size == _SIZE:
        return images
    from PIL import Image

    pictures = (
        Image.fromarray(image[..., 0]).resize((size, size), Image.Resampling.BICUBIC) for image in images
    )
    return np.stack([np.asarray(picture) for picture in pictures])[..., None]


def _stratified_choice(labels: Int32[np.ndarray, " n"], per_class: int) -> Bool[np.ndarray, " n"]:
    """Choose `per_class` examples of every class at random, always the same ones.

    It sorts raw Philox output, which NumPy promises never to change, unlike `Generator.permutation`.
    """
    ranks = np.random.Philox(np.random.SeedSequence(0)).random_raw(len(labels))
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(ranks[members])[:per_class]]] = True
    return chosen
