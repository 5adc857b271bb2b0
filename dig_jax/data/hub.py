"""Images in the Hugging Face Hub's formats: parquet files or tars, on the Hub or in a folder.

`datasets` copies the shards once into Arrow files, which are memory-mapped and read by index. Only the
built-in parquet and tar readers are used: no code of a dataset runs, its paths are not followed, and members
of tars are bounded.
"""

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dig_jax.data.archives import bound_members
from dig_jax.data.encoded import EncodedImage, EncodedSource
from dig_jax.data.options import MAX_CLASSES
from dig_jax.data.source import check_label, default_heldout, fingerprint
from dig_jax.errors import UserError, install_command, one_line, suggest
from dig_jax.progress import is_terminal

# "cache" reads Arrow files prepared earlier when the Hub is unreachable.
_READERS = ("parquet", "webdataset", "cache")
# Names of integer columns that hold classes.
_LABEL_NAMES = ("label", "labels", "class", "cls", "target")


@dataclasses.dataclass(frozen=True, eq=False)
class HubImages:
    """Rows of one split, as `EncodedImages`.

    name: dataset and split, for messages.
    rows: a `datasets.Dataset` that returns Arrow tables.
    image, label: names of the columns; label "": no classes, all labels are 0.
    identity: hash of the images' sizes and labels.
    """

    name: str
    rows: Any
    image: str
    label: str
    identity: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, limit: int | None = None) -> EncodedImage:
        """Read the image's file from its row; a row with only a path yields no data.

        Raises:
            UserError: the storage failed.
        """
        del limit  # files lie in records
        name = f"row {index} of {self.name}"
        try:
            row = self.rows[index]
            image = row[self.image][0].as_py()
        except Exception as error:  # raised by Arrow or the file system
            raise UserError(f"cannot read {name}: {_root_cause(error)}") from error
        data = image["bytes"] if isinstance(image, dict) else image
        return EncodedImage(name, data or b"", row[self.label][0].as_py() if self.label else 0)


def hub(
    split: str,
    dataset: str = "",
    image_size: int | tuple[int, int] = 256,
    crop: str = "adm",
    channels: int = 3,
    subset: str = "",
    train_split: str = "train",
    heldout_split: str = "",
    image: str = "",
    label: str = "",
    num_classes: int = -1,
    cache_dir: str = "",
) -> EncodedSource:
    """Open a folder of shards, or a dataset that the Hub stores as shards.

    The EXIF orientation is ignored, as in published recipes.

    Args:
        split: "train" or "heldout".
        dataset: a folder, or a name on the Hub such as ILSVRC/imagenet-1k.
        image_size: height and width in pixels, or one number for both.
        crop: adm | celeba.
        channels: 3 for RGB, 1 for gray.
        subset: configuration of a dataset with several, such as full_numbers of svhn.
        train_split: split in the notation of `datasets`, such as train or train[:98%].
        heldout_split: held-out split in the same notation; "": validation, else test.
        image: the column of images; "": the only one.
        label: the column of classes: a ClassLabel, or integers from 0; "": the only ClassLabel, else the
            only integer column called label, labels, class, cls or target. Without such a column, the model
            is unconditional.
        num_classes: expected number of classes, of which integer labels may leave the last ones out; -1: from
            the data.
        cache_dir: directory for the Arrow files, which are as large as the shards; "":
            $HF_DATASETS_CACHE, else ~/.cache/huggingface/datasets.

    Raises:
        UserError: `datasets` is not installed, the dataset is missing or unreadable, or its splits, images
            or classes are not as expected.
        ValueError: an invalid option.
    """
    library = _library()
    with _quiet(library):
        builder = _prepared_builder(library, dataset, subset, cache_dir)
        chosen = train_split
        if split == "heldout":
            chosen = heldout_split or default_heldout(dataset, builder.info.splits)
        train, rows = (_rows(builder, dataset, name) for name in (train_split, chosen))
    image = _image_column(library, dataset, rows.features, image)
    label = _label_column(library, dataset, rows.features, label)
    names = _class_names(dataset, train_split, train, label, num_classes)
    labels = _labels(rows, label)
    _check_labels(labels, len(names), f"split {chosen!r} of {dataset}")
    identity = fingerprint(_sizes(rows, image).tobytes(), labels.tobytes())
    return EncodedSource(
        name="hub",
        split=split,
        images=HubImages(f"{dataset} {chosen}", rows, image, label, identity),
        class_names=names,
        image_size=image_size,
        crop=crop,
        upright=False,
        channels=channels,
        notes=()
        if label
        else (f"no classes: {dataset} has no column of labels: {', '.join(rows.features)}",),
    )


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"the hub source needs the package datasets: {install_command('hub')}") from error
    return datasets


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Silence the loggers, since we report errors, and show progress bars on terminals only."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = library.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        if not is_terminal():
            library.disable_progress_bars()
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            library.enable_progress_bars()


def _prepared_builder(library: Any, dataset: str, subset: str, cache_dir: str) -> Any:
    """Return the builder of a dataset, after preparing its Arrow files."""
    if not dataset:
        raise ValueError(
            "missing dataset of the hub source; expected a folder of shards or a name on the Hub"
        )
    if "://" in dataset:
        raise UserError(
            f"unsupported dataset {dataset!r} of the hub source; mount the bucket (docs/guide/data.md) or use"
            " a Hugging Face repository id (owner/name)"
        )
    folder = Path(dataset).expanduser()
    if not folder.is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset):
        raise UserError(
            f"invalid dataset {dataset!r} of the hub source; expected an existing folder or a Hugging Face"
            " repository id (owner/name)"
        )
    path = str(folder.absolute()) if folder.is_dir() else dataset
    try:
        builder = library.load_dataset_builder(path, subset or None, cache_dir=cache_dir or None)
        if builder.name not in _READERS:
            raise UserError(
                f"unsupported format of {dataset}: got {builder.name}; expected shards in parquet files or"
                " tars (for a folder of images use config.data.name=image_folder)"
            )
        if folder.is_dir():
            _check_inside(builder, folder.absolute())
        if builder.name == "webdataset":
            builder._split_generators = bound_members(builder._split_generators)
        builder.download_and_prepare()
    except UserError:
        raise
    except Exception as error:  # raised by the network, the Hub, the file system or Arrow
        raise UserError(f"datasets cannot open {dataset}: {_root_cause(error)}") from error
    return builder


def _check_inside(builder: Any, folder: Path) -> None:
    """Check that a folder's README.md names no files outside the folder; datasets checks this for the Hub."""
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            if "://" in file or not Path(os.path.normpath(file)).is_relative_to(os.path.normpath(folder)):
                raise UserError(f"invalid data file {file!r} in README.md of {folder}: outside the folder")


def _rows(builder: Any, dataset: str, split: str) -> Any:
    try:
        return builder.as_dataset(split=split).with_format("arrow")
    except Exception as error:
        raise UserError(f"cannot open split {split!r} of {dataset}: {_root_cause(error)}") from error


def _check_column(dataset: str, features: dict, option: str, name: str) -> None:
    if name and name not in features:
        raise ValueError(
            f"invalid {option}={name!r}; expected a column of {dataset}:"
            f" {', '.join(features)}{suggest(name, features)}"
        )


def _image_column(library: Any, dataset: str, features: dict, name: str) -> str:
    _check_column(dataset, features, "image", name)
    images = [name for name in ([name] if name else features) if _is_image(library, features[name])]
    if len(images) != 1:
        raise UserError(
            f"{dataset} has {len(images)} image columns ({', '.join(images or features)}); expected one."
            " Set config.data.options.image to its name"
        )
    return images[0]


def _label_column(library: Any, dataset: str, features: dict, name: str) -> str:
    """Return the name of the column of classes, "" without classes."""
    _check_column(dataset, features, "label", name)
    declared = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    labels = [name] if name else declared or [name for name in features if name in _LABEL_NAMES]
    if len(labels) > 1:
        raise ValueError(f"missing label; expected one of the columns {', '.join(labels)} of {dataset}")
    if not labels:
        return ""
    dtype = str(getattr(features[labels[0]], "dtype", "nested"))
    if not re.match(r"u?int\d", dtype):
        raise UserError(f"column {labels[0]!r} of {dataset} has type {dtype}; expected integers from 0")
    return labels[0]


def _is_image(library: Any, feature: Any) -> bool:
    """Return whether a column is declared as images, or holds bytes, with or without a path."""
    if isinstance(feature, dict):
        feature = feature.get("bytes")
    return isinstance(feature, library.Image) or getattr(feature, "dtype", "").endswith("binary")


def _class_names(dataset: str, split: str, train: Any, label: str, num_classes: int) -> tuple[str, ...]:
    names = tuple(getattr(train.features.get(label), "names", ()))
    if label and not names:
        labels = _labels(train, label)
        count = max(int(labels.max(initial=-1)) + 1, num_classes)
        if count > MAX_CLASSES:
            where = f"row {labels.argmax()} of split {split!r} of {dataset}" if len(labels) else "no row"
            raise UserError(
                f"too many classes: got label {labels.max(initial=-1)} in {where} and"
                f" num_classes={num_classes}; expected at most {MAX_CLASSES:,} classes"
            )
        names = tuple(map(str, range(count)))
    if num_classes not in (-1, len(names)):
        raise UserError(f"{dataset} has {len(names)} classes; expected num_classes={num_classes}")
    return names


def _labels(rows: Any, label: str) -> np.ndarray:
    """Return the labels of all rows, -1 for null."""
    if not label:
        return np.zeros(0, np.int64)
    labels = rows.select_columns(label)[:][label]
    try:
        return labels.cast("int64").fill_null(-1).to_numpy()
    except Exception as error:  # Arrow's: beyond 64 bits
        raise UserError(
            f"invalid column {label!r}: {_root_cause(error)}; expected integers from 0"
        ) from error


def _check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    invalid = np.flatnonzero((labels < 0) | (labels >= max(num_classes, 1)))
    if len(invalid):
        row = int(invalid[0])
        check_label(
            int(labels[row]), num_classes, f"row {row} of {name} (labels {labels.min()} to {labels.max()})"
        )


def _sizes(rows: Any, image: str) -> np.ndarray:
    """Return the sizes of all images in bytes, 0 for null."""
    from pyarrow import compute, types  # its stubs lack the functions, which pyarrow generates

    column = rows.select_columns(image)[:][image]
    if types.is_struct(column.type):
        column = compute.struct_field(column, "bytes")  # pyright: ignore[reportAttributeAccessIssue]
    sizes = compute.binary_length(column)  # pyright: ignore[reportAttributeAccessIssue]
    return sizes.fill_null(0).to_numpy()


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error, name_type=True)
