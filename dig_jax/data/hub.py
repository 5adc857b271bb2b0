"""Labelled images in the Hugging Face Hub's format: shards in parquet files or tars, there or in a folder.

`datasets` copies the shards once into Arrow files, which are then read by index through the memory map. Only
its own readers of parquet files and tars are used: nothing of a dataset is run, and no path in one followed.
"""

import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dig_jax.data.encoded import EncodedSource, Record
from dig_jax.data.source import default_heldout, fingerprint
from dig_jax.errors import UserError, suggest

# "cache": what was prepared before, where the Hub cannot be reached.
_READERS = ("parquet", "webdataset", "cache")
# Columns of whole numbers that are taken for classes.
_LABELS = ("label", "labels", "class", "cls", "target")


@dataclasses.dataclass(frozen=True, eq=False)
class HubRecords:
    """Rows of one split, as `Records`.

    name: dataset and split, for messages.
    rows: a `datasets.Dataset` that gives Arrow tables.
    image, label: columns; label "": there is none, and all are 0.
    identity: hash of the sizes of the images and the labels.
    """

    name: str
    rows: Any
    image: str
    label: str
    identity: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> Record:
        """The image's file as it stands in its row; nothing, where there is only the path of one.

        Raises:
            UserError: the storage fails.
        """
        name = f"row {index} of {self.name}"
        try:
            row = self.rows[index]
            image = row[self.image][0].as_py()
        except Exception as error:  # Arrow's, the file system's
            raise UserError(f"{name} cannot be read: {_reason(error)}") from error
        data = image["bytes"] if isinstance(image, dict) else image
        return Record(name, data or b"", row[self.label][0].as_py() if self.label else 0)


def hub(
    split: str,
    dataset: str = "",
    image_size: int = 256,
    crop: str = "adm",
    subset: str = "",
    train_split: str = "train",
    heldout_split: str = "",
    image: str = "",
    label: str = "",
    num_classes: int = -1,
    cache_dir: str = "",
) -> EncodedSource:
    """A folder of shards, or a dataset of the Hub that is stored as such, read through `datasets`.

    Images are not turned as EXIF says: published recipes do not.

    Args:
        split: "train" or "heldout".
        dataset: the folder; or, where there is none, the name on the Hub, such as ILSVRC/imagenet-1k.
        image_size: height and width in pixels.
        crop: adm | celeba.
        subset: of a dataset that has several, such as full_numbers of svhn.
        train_split: in the notation of `datasets`, such as train or train[:98%].
        heldout_split: likewise; "": validation, or else test.
        image: the column of images; "": the only one.
        label: the column of classes, which are named, or whole numbers from 0; "": the only one of named
            classes, or else of numbers, called label, labels, class, cls or target; if there is none, the
            model becomes unconditional.
        num_classes: to be checked, and of numbers how many there are; -1: as many as there are.
        cache_dir: for the Arrow files, as large as the shards; "": $HF_DATASETS_CACHE, or
            ~/.cache/huggingface/datasets.

    Raises:
        UserError: `datasets` is not installed, or the dataset is not there, cannot be read, or has no such
            split, no images, no such classes, or another number of them.
        ValueError: a setting that cannot be.
    """
    library = _library()
    with _quiet(library):
        builder = _prepared(library, dataset, subset, cache_dir)
        chosen = train_split
        if split == "heldout":
            chosen = heldout_split or default_heldout(dataset, builder.info.splits)
        train, rows = (_rows(builder, dataset, part) for part in (train_split, chosen))
    image, label = _columns(library, dataset, rows.features, image, label)
    names = _class_names(dataset, train, label, num_classes)
    labels = _labels(rows, label)
    if len(labels) and not 0 <= labels.min() <= labels.max() < max(len(names), 1):
        raise UserError(
            f"the split {chosen!r} of {dataset} has labels from {labels.min()} to {labels.max()}, and its"
            f" {len(names)} classes are numbered from 0; take another split, where -1 says that it has none"
        )
    identity = fingerprint(_sizes(rows, image).tobytes(), labels.tobytes())
    return EncodedSource(
        name="hub",
        split=split,
        records=HubRecords(f"{dataset} {chosen}", rows, image, label, identity),
        class_names=names,
        image_size=image_size,
        crop=crop,
        upright=False,
    )


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"the hub source needs Hugging Face's datasets: pip install -e '.[hub]' ({error})"
        ) from error
    return datasets


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """What fails is told once, by us; bars of progress are for terminals."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = library.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        if not sys.stderr.isatty():
            library.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            library.enable_progress_bars()


def _prepared(library: Any, dataset: str, subset: str, cache_dir: str) -> Any:
    """The builder of a dataset whose Arrow files are there."""
    if not dataset:
        raise ValueError("dataset of the hub source is missing: a folder of shards, or a name on the Hub")
    folder = Path(dataset).expanduser()
    if not folder.is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset):
        raise UserError(f"there is no folder {dataset!r}, nor can it be a name on the Hub, OWNER/NAME")
    path = str(folder.absolute()) if folder.is_dir() else dataset
    try:
        builder = library.load_dataset_builder(path, subset or None, cache_dir=cache_dir or None)
        if builder.name not in _READERS:
            raise UserError(
                f"{dataset} is read as {builder.name}, and not as shards in parquet files or tars; for a"
                " folder of images there is config.data.name=image_folder"
            )
        builder.download_and_prepare()
    except UserError:
        raise
    except Exception as error:  # of the network, the Hub, the file system, Arrow, `datasets`
        raise UserError(f"{dataset} cannot be opened by datasets: {_reason(error)}") from error
    return builder


def _rows(builder: Any, dataset: str, split: str) -> Any:
    try:
        return builder.as_dataset(split=split).with_format("arrow")
    except Exception as error:
        raise UserError(f"the split {split!r} of {dataset} cannot be opened: {_reason(error)}") from error


def _columns(library: Any, dataset: str, features: dict, image: str, label: str) -> tuple[str, str]:
    """The names of the image and of the class, "" if there is none."""
    for option, given in (("image", image), ("label", label)):
        if given and given not in features:
            known = f"{suggest(given, features)} (its: {', '.join(features)})"
            raise ValueError(f"{option}={given!r} is no column of {dataset}{known}")
    images = [name for name in ([image] if image else features) if _is_image(library, features[name])]
    if len(images) != 1:
        raise UserError(
            f"{dataset} has {len(images) or 'no'} columns of images ({', '.join(images or features)}); say"
            " which it is by config.data.options.image"
        )
    named = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    labels = [label] if label else named or [name for name in features if name in _LABELS]
    if len(labels) > 1:
        raise ValueError(f"label is missing: {dataset} has {', '.join(labels)}")
    kind = str(getattr(features[labels[0]], "dtype", "nested")) if labels else "int64"
    if not re.match(r"u?int\d", kind):
        raise UserError(f"the column {labels[0]!r} of {dataset} is of type {kind}; classes are whole numbers")
    return images[0], "".join(labels)


def _is_image(library: Any, feature: Any) -> bool:
    """One that is declared as such, or bytes, alone or beside a path, as images are stored."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return isinstance(feature, library.Image) or getattr(feature, "dtype", "").endswith("binary")


def _class_names(dataset: str, train: Any, label: str, num_classes: int) -> tuple[str, ...]:
    names = tuple(getattr(train.features.get(label), "names", ()))
    if label and not names:
        largest = _labels(train, label).max(initial=-1)
        names = tuple(map(str, range(max(int(largest) + 1, num_classes))))
    if num_classes not in (-1, len(names)):
        raise UserError(f"{dataset} has {len(names)} classes, not num_classes={num_classes}")
    return names


def _labels(rows: Any, label: str) -> np.ndarray:
    """Of all rows; -1 where there is none."""
    if not label:
        return np.zeros(0, np.int64)
    return rows.select_columns(label)[:][label].fill_null(-1).to_numpy()


def _sizes(rows: Any, image: str) -> np.ndarray:
    """Of all images, in bytes; 0 where there is none."""
    from pyarrow import compute, types

    column = rows.select_columns(image)[:][image]
    if types.is_struct(column.type):
        column = compute.struct_field(column, "bytes")
    return compute.binary_length(column).fill_null(0).to_numpy()


def _reason(error: BaseException) -> str:
    """The first line of the error that began it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
