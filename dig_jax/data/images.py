"""Decode and crop images with Pillow, in bounded time and memory."""

import contextlib
import io
import re
import threading
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError, features

from dig_jax.errors import one_line

HAS_AVIF = bool(features.check("avif"))
# Detected by content, not by file name. Pillow's other formats run programs (EPS) or are not images.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(["AVIF"] if HAS_AVIF else []))
# Pillow's modes by number of channels.
MODES = {1: "L", 3: "RGB"}
# Pillow's limit, a quarter of a gigabyte as RGB; the header is checked before anything is decoded.
MAX_PIXELS = 89_478_485
# The longest side that a JPEG can have. Pillow keeps a pointer per row, which a narrow image makes expensive.
MAX_SIDE = 65_535
MAX_BYTES = 2**28
# Pixels that all threads may decode at once: about 3 GB.
_PIXELS_AT_ONCE = 2**28
# Scans of a JPEG, and pixels times scans; an encoder writes about 10 scans.
_MAX_SCANS, _MAX_SCANNED_PIXELS, _MAX_MARKERS = 100, 20 * MAX_PIXELS, 10_000
# Pillow reads headers of PPM files byte by byte, and numbers written as text number by number.
_PPM_HEADER = re.compile(rb"P[1-6](?:(?:\s|#[^\n\r]*[\n\r])+\d+){2}\s")
_MAX_PPM_HEADER, _MAX_PPM_TEXT = 2**12, 2**22
_STRIP = 1024  # rows
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange rows and columns


class UnreadableImage(Exception):
    """An image that is corrupt or too large, or whose colors are undefined."""


def decode(data: bytes, *, upright: bool = True, channels: int = 3) -> Image.Image:
    """Decode a file to RGB or gray.

    Gray is repeated, palettes are looked up, CMYK is converted without a color profile, 16 bits are cut to
    8, transparency is composited on white, and animations yield their first frame. Colors become gray by
    their luma (ITU-R BT.601).

    Args:
        data: the file's content.
        upright: whether to apply the EXIF orientation, as image viewers do.
        channels: 3 for RGB, 1 for gray.

    Raises:
        UnreadableImage: the file cannot be decoded; the message gives the reason.
    """
    if len(data) > MAX_BYTES:
        raise UnreadableImage(f"file too large; expected at most {MAX_BYTES // 2**20} MiB")
    try:
        if data[:1] == b"P":
            _check_ppm(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            if image.format in ("JPEG", "MPO"):
                _check_scans(data, image.width * image.height)
            with _DECODING.of(image.width * image.height):
                image.load()
                if upright:
                    ImageOps.exif_transpose(image, in_place=True)
                rgb = _as_rgb(image)
                return rgb if rgb.mode == MODES[channels] else rgb.convert(MODES[channels])
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(
            f"unsupported format or corrupt header; expected {', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # decoders raise errors of any kind
        raise UnreadableImage(one_line(error, name_type=True)) from error


def native_size(data: bytes, *, upright: bool = True) -> tuple[int, int]:
    """Return (height, width) of an image from the beginning of its file, as `decode` would return it.

    An EXIF orientation that follows the pixels, as in some PNG files, is not found.

    Raises:
        UnreadableImage: the header is corrupt or incomplete.
    """
    try:
        if data[:1] == b"P":
            _check_ppm(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            exif = Image.Exif()
            exif.load(image.info.get("exif", b""))
            turned = upright and exif.get(ExifTags.Base.Orientation) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise errors of any kind
        raise UnreadableImage(one_line(error, name_type=True)) from error


def adm_crop(image: Image.Image, size: int | tuple[int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """Crop the center of an image as ADM (Dhariwal & Nichol 2021), DiT and DiG do.

    The image is halved by box averages while each side is at least twice that of `size`, resized bicubically
    to just cover `size`, and cropped. ADM crops squares only.

    Args:
        image: gray or RGB.
        size: height and width in pixels, or one number for both.

    Raises:
        UnreadableImage: the image is so elongated that the resized image would be too large.
    """
    height, width = _height_and_width(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    resized = round(image.width * scale), round(image.height * scale)
    _check_size(*resized)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return _pixels(image.crop((left, top, left + width, top + height)))


def celeba_crop(
    image: Image.Image, size: int | tuple[int, int]
) -> UInt8[np.ndarray, "height width channels"]:
    """Crop the face in an aligned CelebA image as DDIM (Song et al. 2021) and DiG do.

    The 128 × 128 pixels around (89, 121) are resized bilinearly.

    Args:
        image: gray or RGB.
        size: height and width in pixels, or one number for both.

    Raises:
        UnreadableImage: the image is not 178 × 218, the size of aligned CelebA images.
    """
    if image.size != (178, 218):
        raise UnreadableImage(
            f"invalid size of an aligned CelebA image: got {image.width} × {image.height} px;"
            " expected 178 × 218"
        )
    height, width = _height_and_width(size)
    face = image.crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
    return _pixels(face.resize((width, height), Image.Resampling.BILINEAR))


Crop = Callable[[Image.Image, int | tuple[int, int]], UInt8[np.ndarray, "height width channels"]]
CROPS: dict[str, Crop] = {"adm": adm_crop, "celeba": celeba_crop}
# Crops that would distort an image of another shape.
SQUARE_CROPS = ("celeba",)


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _pixels(image: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    return np.asarray(image).reshape(image.height, image.width, -1)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"too many pixels: got {width:,} × {height:,}; expected at most {MAX_PIXELS:,}")
    if max(width, height) > MAX_SIDE:
        raise UnreadableImage(f"side too long: got {width:,} × {height:,} px; expected at most {MAX_SIDE:,}")


def _check_ppm(data: bytes) -> None:
    """Reject PPM files that would take Pillow minutes: long comments, and megabytes of numbers as text."""
    if not _PPM_HEADER.match(data, 0, _MAX_PPM_HEADER):
        raise UnreadableImage(f"unsupported or corrupt PPM; expected a header of at most {_MAX_PPM_HEADER} B")
    if data[1:2] in b"123" and len(data) > _MAX_PPM_TEXT:
        raise UnreadableImage(f"PPM of text is too large; expected at most {_MAX_PPM_TEXT // 2**20} MiB")


def _check_scans(data: bytes, pixels: int) -> None:
    """Reject a JPEG whose scans would take minutes: each of them may visit all pixels."""
    scans = _scans(data)
    if scans > min(_MAX_SCANS, max(_MAX_SCANNED_PIXELS // max(pixels, 1), 1)):
        raise UnreadableImage(f"too many JPEG scans for {pixels:,} pixels: got {scans}")


# A marker in a scan's data, where 0 and restarts (0xD0 to 0xD7) follow an 0xFF of the data.
_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
_SCAN, _END = 0xDA, 0xD9


def _scans(data: bytes) -> int:
    """Return the number of scans of a JPEG. Thumbnails in its metadata have scans of their own."""
    scans, position = 0, 2
    for _ in range(_MAX_MARKERS):
        marker = _MARKER.search(data, position)
        if marker is None or marker[0][-1] == _END:
            return scans
        scans, position = scans + (marker[0][-1] == _SCAN), marker.end()
        position += int.from_bytes(data[position : position + 2], "big")
    raise UnreadableImage(f"too many JPEG segments; expected at most {_MAX_MARKERS}")


class _Budget:
    """Pixels that all threads may decode at once; an image that is larger waits until it is alone."""

    def __init__(self, total: int):
        self._free, self._total, self._changed = total, total, threading.Condition()

    @contextlib.contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._total)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_DECODING = _Budget(_PIXELS_AT_ONCE)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImage(
            f"unsupported pixels: got Pillow's mode {image.mode}, which does not define white; expected"
            " integers of 1, 8 or 16 bits"
        )
    if image.has_transparency_data:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """Composite an image on white, in strips: Pillow makes three copies."""
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result
