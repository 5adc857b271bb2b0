"""Sources of labelled images: what can be read by index, and what is known of it."""

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from dig_jax.errors import UserError

Example = dict[str, np.ndarray | np.int32]

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What a model must know of the images that it makes, and a checkpoint says of them.

    image_shape: (height, width, channels).
    class_names: the name of each label, in order.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of labels; 0: there are no classes."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"image_shape": list(self.image_shape), "class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ImageSpec | None":
        """What `described` gave, beside other things; None where it is not there.

        Raises:
            ValueError: it is there, but damaged.
        """
        if not {"image_shape", "class_names"} <= fields.keys():
            return None
        shape, names = fields["image_shape"], fields["class_names"]
        if not (
            isinstance(shape, list)
            and isinstance(names, list)
            and len(shape) == 3
            and all(type(size) is int and size > 0 for size in shape)
            and all(type(name) is str for name in names)
        ):
            raise ValueError(f"image_shape={shape!r} and class_names cannot be")
        return cls(tuple(shape), tuple(names))


@runtime_checkable
class Source(Protocol):
    """Labelled images with random access; any thread and any process may read any index.

    name: what `registry.load_source` calls it.
    split: "train" or "heldout".
    image_shape: (height, width, channels) of every image.
    class_names: the name of each label, in order.
    flip: whether an image keeps its class when it is mirrored left to right.
    fingerprint: hexadecimal; equal for equal content in equal order, so that a resumed run can tell.
    """

    name: str
    split: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    flip: bool
    fingerprint: str

    @property
    def num_classes(self) -> int:
        """Number of labels: they are 0 … num_classes - 1; 0: there are no classes, and all labels are 0."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """{"image": [height, width, channels], "label": int32} for 0 ≤ index < len.

        The image is uint8, or float32 as the model sees it, in about -1…1.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource:
    """Images and labels that lie in memory."""

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
        """Hash of everything that an example of this source depends on."""
        return fingerprint(
            self.name, self.split, self.image_shape, self.images.tobytes(), self.labels.tobytes()
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeSource:
    """Images made from their index: a checkerboard of waves for each class, shifted, dimmed and noisy.

    Class k is a product of two cosines, one across and one down, whose frequencies count through k. The one
    across is even about the middle, so that a mirrored image keeps its class. Needs no storage: a stand-in
    for data of any size in tests, benchmarks and dry runs.
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
        """The labels themselves, as text."""
        return tuple(map(str, range(self.num_classes)))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that an example of this source depends on."""
        return fingerprint(self.name, self.split, self.image_shape, self.num_classes, self.length, self.seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside a source of {self.length} images")
        height, width, channels = self.image_shape
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        label = index % max(self.num_classes, 1)
        down, across = divmod(label, int(np.ceil(np.sqrt(max(self.num_classes, 1)))))
        phases = random.uniform(-1, 1, channels)
        rows = np.cos(np.pi * ((down + 1) * np.linspace(-1, 1, height)[:, None] + phases))  # [h, c]
        columns = np.cos(np.pi * (across + 1) / 2 * np.linspace(-1, 1, width))
        wave = np.float32(random.uniform(60, 110) * rows[:, None]) * np.float32(columns)[:, None]
        noise = random.integers(0, 256, self.image_shape, np.uint8) >> 3
        return {"image": (111.5 + wave).astype(np.uint8) + noise, "label": np.int32(label)}


@functools.cache
def digits(split: str) -> ArraySource:
    """Handwritten digits, 8×8 grey: 1,437 to train on and 360 (36 of each class) held out.

    scikit-learn carries them: the test part of "Optical Recognition of Handwritten Digits" (Alpaydin and
    Kaynak 1998, UCI repository), 0 … 16 per pixel, here spread over 0 … 255. The split is over images, not
    writers. A mirrored digit is no longer a digit, so they are never flipped.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    held_out = _stratified(labels, per_class=36)
    chosen = held_out if split == "heldout" else ~held_out
    images, labels = images[chosen], labels[chosen]
    images.flags.writeable = labels.flags.writeable = False
    return ArraySource(
        name="digits",
        split=split,
        images=images,
        labels=labels,
        class_names=tuple("0123456789"),
        flip=False,
    )


def fake(
    split: str,
    image_size: int | tuple[int, int] = 32,
    channels: int = 3,
    num_classes: int = 10,
    length: int = 1024,
    seed: int = 0,
    path: str = "",
) -> FakeSource:
    """Made-up images of any size: `length` to train on and a fifth as many held out.

    Args:
        split: "train" or "heldout".
        image_size: height and width in pixels, or one number for both.
        channels: per pixel.
        num_classes: labels go round: the label of image i is i mod num_classes; 0: no classes, all are 0.
        length: number of training images.
        seed: another seed makes other images of the same classes.
        path: of what these stand in for, so that the options of latents may stay; nothing is there.
    """
    del path
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    least = {"image_size": 1, "channels": 1, "num_classes": 0, "length": 1}
    given = (min(height, width), channels, num_classes, length)
    for (option, minimum), size in zip(least.items(), given, strict=True):
        if size < minimum:
            raise ValueError(f"{option} of the fake source must be at least {minimum}, got {size}")
    return FakeSource(
        split=split,
        image_shape=(height, width, channels),
        num_classes=num_classes,
        length=length if split == "train" else -(-length // 5),
        seed=seed,
    )


def default_heldout(dataset: str, splits: Collection[str]) -> str:
    """Which of the splits of a dataset is held out where nothing is said: validation, or else test.

    Raises:
        UserError: it has neither.
    """
    found = [name for name in ("validation", "test") if name in splits]
    if not found:
        raise UserError(
            f"{dataset} has neither validation nor test images; set train_split='train[:98%]' and"
            " heldout_split='train[98%:]', or the like"
        )
    return found[0]


def _stratified(labels: Int32[np.ndarray, " n"], per_class: int) -> Bool[np.ndarray, " n"]:
    """A fixed random choice of `per_class` examples of every class.

    Drawn by sorting raw Philox output, which NumPy promises never to change; its `permutation` may.
    """
    ranks = np.random.Philox(np.random.SeedSequence(0)).random_raw(len(labels))
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen[members[np.argsort(ranks[members])[:per_class]]] = True
    return chosen


def fingerprint(*parts: object) -> str:
    """Hash of these parts, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()[:16]
