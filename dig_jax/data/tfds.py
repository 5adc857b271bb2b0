"""Image datasets of TensorFlow Datasets, read without TensorFlow.

`tfds.data_source` reads array_record files by index and leaves the images encoded.
"""

import dataclasses
from typing import Any

from dig_jax.data.encoded import EncodedImage, EncodedSource
from dig_jax.data.source import default_heldout, fingerprint
from dig_jax.errors import UserError, install_command, one_line, suggest


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsImages:
    """Examples of one split, as `EncodedImages`.

    name: dataset, version and split, for messages.
    examples: TFDS's data source, which returns {image: bytes, label: int} by index.
    image, label: names of the features; label "": no classes, all labels are 0.
    identity: hash of version, split and files.
    """

    name: str
    examples: Any
    image: str
    label: str
    identity: str

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, index: int, limit: int | None = None) -> EncodedImage:
        """Read the image's file as it was when the dataset was prepared.

        Raises:
            UserError: the files are corrupt or missing.
        """
        del limit  # files lie in records
        name = f"record {index} of {self.name}"
        try:
            example = self.examples[index]
        except Exception as error:  # array_record defines no error classes
            reason = one_line(error, name_type=True)
            raise UserError(f"cannot read {name}: {reason}; prepare the dataset again") from error
        return EncodedImage(name, example[self.image], int(example[self.label]) if self.label else 0)


def tfds(
    split: str,
    dataset: str = "",
    image_size: int | tuple[int, int] = 256,
    crop: str = "adm",
    channels: int = 3,
    data_dir: str = "",
    train_split: str = "train",
    heldout_split: str = "",
    label: str = "",
    num_classes: int = -1,
) -> EncodedSource:
    """Open a dataset that was prepared with `tfds build DATASET --file_format=array_record`.

    Preparing needs TensorFlow, reading does not. The EXIF orientation is ignored, as in published recipes.

    Args:
        split: "train" or "heldout".
        dataset: TFDS's name, such as cifar10, imagenet2012 or celeb_a:2.1.0.
        image_size: height and width in pixels, or one number for both.
        crop: adm | celeba.
        channels: 3 for RGB, 1 for gray.
        data_dir: directory of prepared datasets; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets.
        train_split: split in TFDS's notation, such as train or train[:98%].
        heldout_split: held-out split in the same notation; "": validation, else test.
        label: the feature with the class; "": the only ClassLabel. Without one, the model is unconditional.
        num_classes: expected number of classes; -1: not checked. --mode=plan uses it without the data.

    Raises:
        UserError: TFDS is not installed, the dataset is unknown or not prepared, or its splits or classes
            differ.
        ValueError: an invalid option.
    """
    library = _library()
    if not dataset:
        raise ValueError("missing dataset of the tfds source; expected a name such as cifar10")
    builder = _builder(library, dataset, data_dir)
    splits = list(builder.info.splits)
    heldout = heldout_split or default_heldout(dataset, splits)
    image, label = _features(library, builder, label)
    names = tuple(builder.info.features[label].names) if label else ()
    if num_classes not in (-1, len(names)):
        raise UserError(f"{dataset} has {len(names)} classes; expected num_classes={num_classes}")
    chosen = train_split if split == "train" else heldout
    try:
        info = builder.info.splits[chosen]
        examples = builder.as_data_source(chosen, decoders={image: library.decode.SkipDecoding()})
    except Exception as error:
        raise UserError(f"unknown split {chosen!r} of {dataset}; expected {', '.join(splits)}") from error
    files = info.filenames, [builder.info.splits[name].shard_lengths for name in splits]
    identity = fingerprint(builder.info.full_name, chosen, len(examples), image, label, files)
    return EncodedSource(
        name="tfds",
        split=split,
        images=TfdsImages(f"{builder.info.full_name} {chosen}", examples, image, label, identity),
        class_names=names,
        image_size=image_size,
        crop=crop,
        upright=False,
        channels=channels,
        notes=() if label else (_without_classes(builder),),
    )


def _library() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"the tfds source needs TensorFlow Datasets (but not TensorFlow): {install_command('tfds')}"
        ) from error
    return tensorflow_datasets


def _builder(library: Any, dataset: str, data_dir: str) -> Any:
    """Return the builder of a dataset that is prepared as array_record."""
    where = data_dir or str(library.core.constants.DATA_DIR)
    build = f"tfds build {dataset} --file_format=array_record --data_dir={where}"
    command = f"run this once where TensorFlow is installed: {build}"
    try:
        builder = library.builder(dataset, data_dir=data_dir or None)
    except library.core.registered.DatasetNotFoundError as error:
        hint = suggest(dataset, library.list_builders(with_community_datasets=False))
        raise UserError(f"unknown TFDS dataset {dataset!r}, also not found in {where}{hint}") from error
    except Exception as error:
        reason = one_line(error, name_type=True)
        raise UserError(f"TFDS cannot open {dataset!r} in {where}: {reason}") from error
    if not builder.info.splits:
        raise UserError(f"{dataset} is not prepared in {where}; {command}")
    if builder.info.file_format.value != "array_record":
        kind = builder.info.file_format.value
        raise UserError(f"{dataset} in {where} is stored as {kind}; expected array_record; {command}")
    return builder


def _without_classes(builder: Any) -> str:
    kinds = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in builder.info.features.items())
    return f"no classes: none of the features of {builder.info.full_name} is a ClassLabel: {kinds}"


def _features(library: Any, builder: Any, label: str) -> tuple[str, str]:
    """Return the names of the features with the image and the class, "" without classes."""
    features = dict(builder.info.features)
    images = [name for name, feature in features.items() if isinstance(feature, library.features.Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, library.features.ClassLabel)]
    if len(images) != 1:
        raise UserError(f"{builder.info.full_name} has {len(images)} images per example; expected one")
    if label and label not in classes:
        raise ValueError(
            f"invalid label={label!r}; expected a ClassLabel of {builder.info.full_name}:"
            f" {', '.join(classes)}"
        )
    if not label and len(classes) > 1:
        raise ValueError(f"missing label; expected one of {', '.join(classes)} of {builder.info.full_name}")
    return images[0], label or "".join(classes)
