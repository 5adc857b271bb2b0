"""The protocol of image sources, and the description of images that models and checkpoints keep."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from dig_jax.errors import UserError

Example = dict[str, Any]

SPLITS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Shape and classes of the images that a model generates.

    image_shape: (height, width, channels).
    class_names: the name of each label, in order.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 without classes."""
        return len(self.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"image_shape": list(self.image_shape), "class_names": list(self.class_names)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "ImageSpec | None":
        """Return the spec in `fields`, which may hold other fields, or None if there is no spec.

        Raises:
            ValueError: invalid fields.
        """
        if not {"image_shape", "class_names"} <= fields.keys():
            return None
        shape, names = fields["image_shape"], fields["class_names"]
        if not (
            isinstance(shape, list)
            and len(shape) == 3
            and all(type(size) is int and size > 0 for size in shape)
            and isinstance(names, list)
            and all(type(name) is str for name in names)
        ):
            raise ValueError(
                f"invalid image_shape={shape!r} or class_names; expected three positive sizes and strings"
            )
        return cls((shape[0], shape[1], shape[2]), tuple(names))


@runtime_checkable
class Source(Protocol):
    """Labeled images with random access, from any thread and any process.

    A source may also have `notes: tuple[str, ...]`, lines about what it left out and why, for the start of a
    run.
    """

    @property
    def name(self) -> str:
        """The name under which `registry.load_source` opens it."""
        ...

    @property
    def split(self) -> str:
        """ "train" or "heldout"."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each label, in order."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of labels, 0 … num_classes - 1; 0 for a source without classes, whose labels are all 0."""
        ...

    @property
    def flip(self) -> bool:
        """Whether a mirrored image keeps its class."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hexadecimal hash of content and order; a resumed run compares it."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Return {"image": [height, width, channels], "label": int32} for 0 ≤ index < len.

        The image is uint8, or float32 in the model's range of about -1…1.
        """
        ...


def check_label(label: int, num_classes: int, name: str) -> None:
    """Raise a UserError that names the example unless its label is that of a class, or 0 without classes."""
    if not 0 <= label < max(num_classes, 1):
        reason = "; -1 means unlabeled: use a split with labels" if label == -1 else ""
        raise UserError(
            f"invalid label of {name}: got {label}; expected 0 to {max(num_classes, 1) - 1}{reason}"
        )


def default_heldout(dataset: str, splits: Collection[str]) -> str:
    """Return the split to hold out by default: "validation", else "test".

    Raises:
        UserError: the dataset has neither.
    """
    found = [name for name in ("validation", "test") if name in splits]
    if not found:
        raise UserError(
            f"{dataset} has neither a validation nor a test split; set train_split and heldout_split, for"
            " example train_split='train[:98%]' and heldout_split='train[98%:]'"
        )
    return found[0]


def fingerprint(*values: object) -> str:
    """Return the hash of bytes and of the `repr` of other values, in hexadecimal."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(value if isinstance(value, bytes) else repr(value).encode())
    return digest.hexdigest()[:16]
