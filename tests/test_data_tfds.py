import io
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_data_images import noise

from configs import celeba64, cifar10
from dig_jax import config
from dig_jax.components import Components
from dig_jax.data import batches, load_source
from dig_jax.data.images import adm_crop, decode
from dig_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")  # TFDS and what it imports have some of their own


@pytest.fixture(scope="module")
def library():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_GCE_CHECK", "true")
        yield pytest.importorskip("tensorflow_datasets", reason="pip install -e '.[tfds]'")


def jpeg(number):
    file = io.BytesIO()
    Image.fromarray(noise(20 + number, 24, seed=number)).save(file, "JPEG")
    return file.getvalue()


def prepare(library, directory, name, features, examples, splits):
    """Writes a dataset with TFDS's own writer, as `tfds build` does."""

    def write(self, count):
        for number in range(count):
            yield number, examples(number)

    builder = type(
        name,
        (library.core.GeneratorBasedBuilder,),
        {
            "VERSION": library.core.Version("1.0.0"),
            "__module__": __name__,
            "_info": lambda self: library.core.DatasetInfo(
                builder=self, features=library.features.FeaturesDict(features)
            ),
            "_split_generators": lambda self, _: {
                split: write(self, count) for split, count in splits.items()
            },
            "_generate_examples": write,
        },
    )
    with library.core.registered.skip_registration():
        builder(data_dir=directory, file_format="array_record").download_and_prepare()


@pytest.fixture(scope="module")
def data_dir(library, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    image = library.features.Image(shape=(None, None, 3))
    animals = library.features.ClassLabel(names=["cat", "dog", "fox"])

    def labelled(number):
        data = jpeg(number)
        return {"image": io.BytesIO(data[:300] if number == 4 else data), "label": number % 3}

    features = {"image": image, "label": animals}
    prepare(library, directory, "Animals", features, labelled, {"train": 9, "test": 3, "validation": 2})
    prepare(library, directory, "Whole", features, labelled, {"train": 9})
    faces = {"image": image, "attributes": {"Smiling": np.bool_}}
    prepare(
        library,
        directory,
        "Faces",
        faces,
        lambda number: {"image": io.BytesIO(jpeg(number)), "attributes": {"Smiling": True}},
        {"train": 2, "validation": 1},
    )

    def unlabeled(number):
        return {"image": io.BytesIO(jpeg(number)), "label": -1 if number == 1 else 0}

    prepare(library, directory, "Unlabeled", features, unlabeled, {"train": 3, "test": 1})
    numbered = {"image": image, "label": np.int64}
    prepare(library, directory, "Numbered", numbered, unlabeled, {"train": 3, "test": 1})
    return directory


def load(data_dir, dataset="animals", split="train", **options):
    options = {"dataset": dataset, "data_dir": str(data_dir), "image_size": 8, **options}
    return load_source("tfds", split, **options)


def test_examples_are_those_that_were_written(data_dir):
    source = load(data_dir)
    assert (source.name, source.class_names, len(source)) == ("tfds", ("cat", "dog", "fox"), 9)
    assert source.image_shape == (8, 8, 3)
    expected = {
        tuple(adm_crop(decode(jpeg(number)), 8).ravel()): number % 3 for number in range(9) if number != 4
    }
    seen = set()
    for index in range(9):
        example = source[index]
        assert example["label"] == expected[tuple(example["image"].ravel())]
        seen.add(tuple(example["image"].ravel()))
    assert len(seen) == 8


def test_a_corrupt_image_in_a_record_is_named_and_replaced(data_dir, caplog):
    caplog.set_level(logging.WARNING, logger="dig_jax")
    source = load(data_dir)
    images = [source[index]["image"] for index in range(9)]
    assert source.num_unreadable == 1
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("dig_jax")]
    assert message.startswith("replaced unreadable image record ")
    assert "of animals/1.0.0 train: " in message
    for index, image in enumerate(load(data_dir)[index]["image"] for index in range(9)):
        np.testing.assert_array_equal(image, images[index])


def test_held_out_images_are_the_validation_split_or_else_the_one_that_is_named(data_dir):
    assert len(load(data_dir, split="heldout")) == 2
    assert len(load(data_dir, split="heldout", heldout_split="test")) == 3
    parts = {"train_split": "train[:5]", "heldout_split": "train[5:]"}
    assert len(load(data_dir, "whole", **parts)) == 5
    assert len(load(data_dir, "whole", "heldout", **parts)) == 4
    with pytest.raises(UserError, match="neither a validation nor a test split; set train_split"):
        load(data_dir, "whole")
    with pytest.raises(UserError, match="unknown split 'tran' of animals; expected "):
        load(data_dir, train_split="tran")
    with pytest.raises(UserError, match="animals has 3 classes; expected num_classes=10"):
        load(data_dir, num_classes=10)


def test_a_dataset_without_classes_is_unconditional(data_dir):
    source = load(data_dir, "faces")
    assert (source.num_classes, source.class_names) == (0, ())
    assert source[1]["label"] == 0


def test_a_label_that_no_class_has_is_refused_and_its_record_named(data_dir):
    source = load(data_dir, "unlabeled")
    place = "invalid label of record . of unlabeled/1.0.0 train: got -1; expected 0 to 2; -1 means unlabeled"
    with pytest.raises(UserError, match=place):
        _ = [source[index] for index in range(3)]
    with pytest.raises(UserError, match=place):
        _ = [source.decode(source.images.read(index)) for index in range(3)]


def test_a_number_that_is_not_declared_as_a_class_leaves_a_note(data_dir):
    source = load(data_dir, "numbered")
    assert source.num_classes == 0
    (note,) = source.notes
    assert note.startswith("no classes: none of the features of numbered/1.0.0 is a ClassLabel: ")
    assert "label (" in note
    assert load(data_dir).notes == ()


def test_images_may_be_gray_and_of_any_shape(data_dir):
    source = load(data_dir, image_size=(8, 12), channels=1)
    assert source.image_shape == source[0]["image"].shape == (8, 12, 1)


@pytest.mark.parametrize(
    "shipped, dataset, shape, classes",
    [(cifar10, "animals", (32, 32, 3), 3), (celeba64, "faces", (64, 64, 3), 0)],
)
def test_the_shipped_configs_open_a_dataset_of_their_kind(data_dir, shipped, dataset, shape, classes):
    c = shipped.get_config()
    assert c.data.options.dataset in ("cifar10", "celeb_a")
    c.data.options.update(dataset=dataset, data_dir=str(data_dir), num_classes=classes)
    components = Components(config.from_dict(c.to_dict()))
    for source in (components.train_source, components.heldout_source):
        assert (source.image_shape, source.num_classes) == (shape, classes)


def test_fingerprints_tell_splits_versions_and_crops_apart(data_dir):
    sources = [load(data_dir), load(data_dir, split="heldout"), load(data_dir, train_split="train[:5]")]
    sources += [load(data_dir, image_size=9), load(data_dir, "faces")]
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert load(data_dir).fingerprint == sources[0].fingerprint


def test_threads_read_the_same_batches(data_dir):
    def stream(threads):
        iterator = batches(load(data_dir), batch_size=6, seed=1, num_threads=threads)
        taken = [next(iterator)["image"] for _ in range(4)]
        iterator.close()
        return np.stack(taken)

    np.testing.assert_array_equal(stream(0), stream(3))


def test_files_that_are_missing_or_of_another_format_say_how_to_prepare_them(data_dir, tmp_path):
    build = "run this once where TensorFlow is installed: tfds build"
    with pytest.raises(UserError, match=f"cifar10 is not prepared in {tmp_path}; {build} cifar10"):
        load(tmp_path, "cifar10")
    with pytest.raises(UserError, match="unknown TFDS dataset 'animal', also not found in"):
        load(data_dir, "animal")
    with pytest.raises(ValueError, match="missing dataset of the tfds source"):
        load(data_dir, "")
    with pytest.raises(
        ValueError, match="invalid label='lable'; expected a ClassLabel of animals/1.0.0: label"
    ):
        load(data_dir, label="lable")
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    info = copy / "whole" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UserError, match=f"whole in .* is stored as tfrecord; expected array_record; {build}"):
        load(copy, "whole")


def test_a_flipped_byte_in_the_storage_is_reported_in_one_line(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    (path,) = (copy / "animals").rglob("animals-train.array_record*")
    damaged = bytearray(path.read_bytes())
    damaged[200] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"cannot read record \d of animals/1.0.0 train: ") as caught:
        _ = list(load(copy))
    assert "\n" not in str(caught.value)


def test_reading_imports_no_tensorflow_that_is_installed(data_dir, tmp_path):
    (tmp_path / "tensorflow.py").write_text("")
    code = (
        f"import sys; sys.path.append({str(tmp_path)!r}); from dig_jax.data import load_source;"
        f"load_source('tfds', 'train', dataset='animals', data_dir={str(data_dir)!r})[0];"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_the_library_the_error_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[tfds\]'"):
        load_source("tfds", "train", dataset="cifar10")
