"""Image-classification sets of TensorFlow Datasets, read without TensorFlow.

`tfds.data_source` reads array_record files by index; the images in them stay encoded until we decode them.
"""

import dataclasses
from typing import Any

from dig_jax.data.encoded import EncodedSource, Record
from dig_jax.data.source import default_heldout, fingerprint
from dig_jax.errors import UserError, suggest


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsRecords:
    """Examples of one split, as `Records`.

    name: dataset, version and split, for messages.
    examples: TFDS's data source, which gives {image: bytes, label: int} by index.
    image, label: the features' names; label "": there is none, and all are 0.
    identity: hash of version, split and files.
    """

    name: str
    examples: Any
    image: str
    label: str
    identity: str

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, index: int) -> Record:
        """The image's file as it was when the set was prepared.

        Raises:
            UserError: the files are damaged or gone.
        """
        name = f"record {index} of {self.name}"
        try:
            example = self.examples[index]
        except Exception as error:  # array_record has no errors of its own
            raise UserError(f"{name} cannot be read: {_first_line(error)}; prepare the set again") from error
        return Record(name, example[self.image], int(example[self.label]) if self.label else 0)


def tfds(
    split: str,
    dataset: str = "",
    image_size: int = 256,
    crop: str = "adm",
    data_dir: str = "",
    train_split: str = "train",
    heldout_split: str = "",
    label: str = "",
    num_classes: int = -1,
) -> EncodedSource:
    """A dataset that TFDS has prepared as array_record: `tfds build DATASET --file_format=array_record`.

    Preparing needs TensorFlow, reading does not.
    Images are not turned as EXIF says: published recipes do not.

    Args:
        split: "train" or "heldout".
        dataset: as TFDS names it, such as cifar10, imagenet2012 or celeb_a:2.1.0.
        image_size: height and width in pixels.
        crop: adm | celeba.
        data_dir: where it was prepared; "": $TFDS_DATA_DIR, or ~/tensorflow_datasets.
        train_split: in TFDS's notation, such as train or train[:98%].
        heldout_split: likewise; "": validation, or else test.
        label: the feature that is the class; "": the only ClassLabel; if there is none, the model becomes
            unconditional.
        num_classes: to be checked, and for a plan without the data; -1: as many as there are.

    Raises:
        UserError: TFDS is not installed, or the dataset is unknown, not prepared, has no such split or
            another number of classes.
        ValueError: a setting that cannot be.
    """
    library = _library()
    if not dataset:
        raise ValueError("dataset of the tfds source is missing: a name such as cifar10")
    builder = _builder(library, dataset, data_dir)
    known = list(builder.info.splits)
    heldout = heldout_split or default_heldout(dataset, known)
    image, label = _features(library, builder, label)
    names = tuple(builder.info.features[label].names) if label else ()
    if num_classes not in (-1, len(names)):
        raise UserError(f"{dataset} has {len(names)} classes, not num_classes={num_classes}")
    chosen = train_split if split == "train" else heldout
    try:
        info = builder.info.splits[chosen]
        examples = builder.as_data_source(chosen, decoders={image: library.decode.SkipDecoding()})
    except Exception as error:
        raise UserError(f"{dataset} has no split {chosen!r} (there are: {', '.join(known)})") from error
    files = info.filenames, [builder.info.splits[name].shard_lengths for name in known]
    identity = fingerprint(builder.info.full_name, chosen, len(examples), image, label, files)
    return EncodedSource(
        name="tfds",
        split=split,
        records=TfdsRecords(f"{builder.info.full_name} {chosen}", examples, image, label, identity),
        class_names=names,
        image_size=image_size,
        crop=crop,
        upright=False,
    )


def _library() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            "the tfds source needs TensorFlow Datasets, without TensorFlow:"
            f" pip install -e '.[tfds]' ({error})"
        ) from error
    return tensorflow_datasets


def _builder(library: Any, dataset: str, data_dir: str) -> Any:
    """The builder of a dataset that is prepared as array_record."""
    where = data_dir or str(library.core.constants.DATA_DIR)
    build = f"tfds build {dataset} --file_format=array_record --data_dir={where}"
    command = f"once, where TensorFlow is installed: {build}"
    try:
        builder = library.builder(dataset, data_dir=data_dir or None)
    except library.core.registered.DatasetNotFoundError as error:
        hint = suggest(dataset, library.list_builders(with_community_datasets=False))
        raise UserError(f"TFDS has no dataset {dataset!r}, and none is prepared in {where}{hint}") from error
    except Exception as error:
        raise UserError(f"TFDS cannot open {dataset!r} in {where}: {_first_line(error)}") from error
    if not builder.info.splits:
        raise UserError(f"{dataset} is not prepared in {where}; {command}")
    if builder.info.file_format.value != "array_record":
        kind = builder.info.file_format.value
        raise UserError(f"{dataset} in {where} is {kind}, which has no random access; {command}")
    return builder


def _features(library: Any, builder: Any, label: str) -> tuple[str, str]:
    """The names of the image and of the class, "" if there is none."""
    features = dict(builder.info.features)
    images = [name for name, feature in features.items() if isinstance(feature, library.features.Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, library.features.ClassLabel)]
    if len(images) != 1:
        raise UserError(f"{builder.info.full_name} has {len(images)} images per example; it should have one")
    if label and label not in classes:
        raise ValueError(
            f"label={label!r} is no class of {builder.info.full_name} (its: {', '.join(classes)})"
        )
    if not label and len(classes) > 1:
        raise ValueError(f"label is missing: {builder.info.full_name} has {', '.join(classes)}")
    return images[0], label or "".join(classes)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
