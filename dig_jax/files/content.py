"""What a file is, by its first bytes. Downloads are often something else than their names say."""

from typing import Literal

from dig_jax.errors import InvalidFile
from dig_jax.files.paths import Path

# Bytes. Headers of DiG-XL and the published autoencoder have about 30 kB; ours may hold many class names.
MAX_HEADER = 8 * 2**20
_BEGINNING = 512
_ZIP = (b"PK\3\4", b"PK\5\6")
# The first pickle of a PyTorch file before PyTorch 1.6.
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_PYTORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<?xml")
_ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf\x27\x1c", b"Rar!")
_FORMATS = {b"\x89HDF": "an HDF5 file", b"GGUF": "a GGUF file", b"\x93NUMPY": "a NumPy file"}

Format = Literal["safetensors", "pytorch", "pickle"]


def weights_format(path: Path) -> Format:
    """Return the format of a file of arrays, by its content and, if it is damaged, by its name.

    Raises:
        InvalidFile: the file is something else, such as a Git LFS pointer or a web page; says what to do.
        OSError: the file is missing or unreadable.
    """
    with path.open("rb") as file:
        start = file.read(_BEGINNING)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if start.startswith((*_ZIP, LEGACY_MAGIC)):
        return "pytorch"
    if start.startswith(b"\x80"):
        return "pickle"
    if not start:
        raise InvalidFile("empty file; download it again")
    check_download(start)
    _check_other_formats(start)
    return "pytorch" if path.suffix in _PYTORCH_SUFFIXES else "safetensors"


def check_download(start: bytes) -> None:
    """Check the first bytes of a file for what a failed download leaves.

    Raises:
        InvalidFile: a Git LFS pointer or a web page; says what to do.
    """
    if start.startswith(_LFS_POINTER):
        raise InvalidFile("a Git LFS pointer, not the file itself; run `git lfs pull` in its repository")
    if start.lstrip().lower().startswith(_MARKUP):
        raise InvalidFile("a web page, not the file; download it again (the page may ask to log in)")


def _check_other_formats(start: bytes) -> None:
    if start.startswith(_ARCHIVES) or start[257:262] == b"ustar":
        raise InvalidFile("a compressed archive; unpack it first")
    for magic, name in _FORMATS.items():
        if start.startswith(magic):
            raise InvalidFile(f"unsupported format: got {name}; expected safetensors or PyTorch's format")
    if len(start) < _BEGINNING and (text := start.decode("utf-8", "replace").strip()).isprintable():
        raise InvalidFile(f"a short text, not the file; download it again: got {text[:80]!r}")
