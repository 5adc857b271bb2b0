"""Features of the training images on disk, the targets of `auxiliary.repa_weight`.

    PATH/plain.npy      float16 [images, rows, columns, channels], in the order of the training split
    PATH/mirrored.npy   the same for the mirror image of each image; only if training mirrors images
    PATH/features.json  what --mode=encode computed them with; absent in folders that other programs wrote

Any program can write the arrays: `numpy.save(path, features.astype(numpy.float16))`.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float16, Int

from dig_jax.data.source import Source, fingerprint
from dig_jax.errors import InvalidFile, UserError, naming_directory, one_line
from dig_jax.files.atomic import new_folder, write_json
from dig_jax.files.json_file import read_json
from dig_jax.files.paths import Path, is_remote, to_path

FORMAT = 1
_PLAIN, _MIRRORED, _ABOUT = "plain.npy", "mirrored.npy", "features.json"
_COMPARED = 64  # images whose features the fingerprint depends on


@dataclasses.dataclass(frozen=True, eq=False)
class StoredFeatures:
    """Features by the index of an image, read on access.

    path: the folder.
    plain: features of the images.
    flipped: features of their mirror images, or None.
    images: fingerprint of the images, if it is known.
    """

    path: pathlib.Path
    plain: Float16[np.ndarray, "n rows columns c"]
    flipped: Float16[np.ndarray, "n rows columns c"] | None
    images: str | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, columns, channels) of the features of an image."""
        rows, columns, channels = self.plain.shape[1:]
        return rows, columns, channels

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the shapes, and of the features of some images."""
        chosen = np.linspace(0, len(self.plain) - 1, min(_COMPARED, len(self.plain))).astype(int)
        arrays = [array for array in (self.plain, self.flipped) if array is not None]
        return fingerprint(self.plain.shape, *(array[chosen].tobytes() for array in arrays))

    def read(
        self, indices: Int[np.ndarray, " b"], flip: Bool[np.ndarray, " b"]
    ) -> Float16[np.ndarray, "b rows columns c"]:
        """Return the features of the images at these indices, or of their mirror images."""
        features = self.plain[indices]
        if flip.any():
            assert self.flipped is not None
            features[flip] = self.flipped[indices[flip]]
        return features

    def check(self, source: Source, flip: bool) -> None:
        """Raise unless these are features of a source.

        Args:
            source: the training images.
            flip: whether training mirrors images.

        Raises:
            UserError: they are of other images, or those of mirror images are missing.
        """
        if len(self.plain) != len(source):
            raise UserError(
                f"invalid features in {self.path}: got {len(self.plain):,} images; expected the"
                f" {len(source):,} training images of config.data"
            )
        if self.images not in (None, source.fingerprint):
            raise UserError(
                f"invalid features in {self.path}: got those of images with fingerprint {self.images};"
                f" expected {source.fingerprint}, as of config.data"
            )
        if flip and source.flip and self.flipped is None:
            raise UserError(
                f"missing {self.path / _MIRRORED}; expected the features of the mirror images, or"
                " config.data.flip=False"
            )


def open_features(path: str) -> StoredFeatures:
    """Open a folder of features.

    Raises:
        UserError: the folder is missing, corrupt or in object storage.
    """
    folder = local_folder(path)
    plain, flipped = (_open(folder / name) for name in (_PLAIN, _MIRRORED))
    if plain is None:
        raise UserError(f"no features in {folder}: {_PLAIN} is missing (docs/concepts/diffusion.md)")
    if flipped is not None and flipped.shape != plain.shape:
        raise UserError(
            f"invalid {folder / _MIRRORED}: got shape {flipped.shape}; expected that of {_PLAIN},"
            f" {plain.shape}"
        )
    return StoredFeatures(folder, plain, flipped, _fingerprint_of_images(folder / _ABOUT))


def local_folder(path: str) -> pathlib.Path:
    """Return a path as a folder on a disk.

    Raises:
        UserError: the path is in object storage, where arrays cannot be read by index.
    """
    folder = to_path(path)
    if is_remote(folder):
        raise UserError(f"unsupported folder of features {path}: in object storage; expected a local one")
    return pathlib.Path(folder).absolute()


@contextlib.contextmanager
def new_features(
    path: Path, count: int, mirrored: bool, about: Mapping[str, Any]
) -> Iterator[Callable[..., None]]:
    """Yield a function that appends features of images, and of their mirror images, to a new folder.

    The folder appears when the block ends.

    Args:
        path: the folder.
        count: number of images.
        mirrored: whether there are features of mirror images.
        about: fields of features.json.

    Raises:
        UserError: the folder exists, cannot be written to, or got another number of images.
    """
    if path.exists():
        raise UserError(f"{path} exists; expected a new folder for the features")
    written = 0
    with naming_directory(path), new_folder(path) as folder, contextlib.ExitStack() as stack:
        names = (_PLAIN, _MIRRORED)[: 1 + mirrored]
        files = [stack.enter_context((folder / name).open("xb")) for name in names]

        def append(*features: np.ndarray) -> None:
            nonlocal written
            for file, array in zip(files, features, strict=True):
                if not written:
                    header = {"descr": "<f2", "fortran_order": False, "shape": (count, *array.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(array, "<f2").data)
            written += len(features[0])

        yield append
        if written != count:
            raise UserError(f"invalid features for {path}: got {written:,} images; expected {count:,}")
        write_json(folder / _ABOUT, {"format": FORMAT, **about})


def _open(path: pathlib.Path) -> np.ndarray | None:
    """Map a file into memory; None if there is no such file."""
    try:
        array = np.load(path, mmap_mode="r")
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is corrupt: {one_line(error)}") from error
    if not isinstance(array, np.memmap) or array.dtype != np.float16 or array.ndim != 4 or not array.size:
        raise UserError(
            f"invalid {path}: got {getattr(array, 'dtype', type(array).__name__)} of shape"
            f" {getattr(array, 'shape', ())}; expected float16 [images, rows, columns, channels]"
        )
    if (expected := array.offset + array.nbytes) != size:
        raise UserError(f"{path} is corrupt: got {size:,} bytes; expected {expected:,}")
    return array


def _fingerprint_of_images(path: pathlib.Path) -> str | None:
    try:
        about = read_json(path)
    except FileNotFoundError:
        return None
    except (InvalidFile, OSError) as error:
        raise UserError(f"{path} is corrupt: {one_line(error)}") from error
    if about.get("format") != FORMAT:
        raise UserError(f"unsupported format of {path}: got {about.get('format')}; expected {FORMAT}")
    images = about.get("images")
    return None if images is None else str(images)
