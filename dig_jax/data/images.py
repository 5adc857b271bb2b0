"""Decode and crop images with Pillow."""

import io
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from dig_jax.errors import one_line

# Detected by content, not by file name. Pillow's other formats run programs (EPS) or are not images.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Pillow's limit, a quarter of a gigabyte as RGB; the header is checked before anything is decoded.
MAX_PIXELS = 89_478_485
MAX_BYTES = 2**28


class UnreadableImage(Exception):
    """An image that is corrupt or too large, or whose colors are undefined."""


def decode(data: bytes, *, upright: bool = True) -> Image.Image:
    """Decode a file to RGB.

    Gray is repeated, palettes are looked up, CMYK is converted without a color profile, 16 bits are cut to
    8, transparency is composited on white, and animations yield their first frame.

    Args:
        data: the file's content.
        upright: whether to apply the EXIF orientation, as image viewers do.

    Raises:
        UnreadableImage: the file cannot be decoded; the message gives the reason.
    """
    if len(data) > MAX_BYTES:
        raise UnreadableImage(f"file too large; expected at most {MAX_BYTES // 2**20} MiB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size)
            image.load()
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            return _as_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(
            f"unsupported format or corrupt header; expected {', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # decoders raise errors of any kind
        raise UnreadableImage(one_line(error, name_type=True)) from error


def adm_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Crop the center of an image as ADM (Dhariwal & Nichol 2021), DiT and DiG do.

    The image is halved by box averages while its shorter side is at least 2·size, resized bicubically to a
    shorter side of `size`, and cropped.

    Raises:
        UnreadableImage: the image is so elongated that the resized image would be too large.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    _check_size(width, height)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def celeba_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Crop the face in an aligned CelebA image as DDIM (Song et al. 2021) and DiG do.

    The 128 × 128 pixels around (89, 121) are resized bilinearly.

    Raises:
        UnreadableImage: the image is not 178 × 218, the size of aligned CelebA images.
    """
    if image.size != (178, 218):
        raise UnreadableImage(
            f"invalid size of an aligned CelebA image: got {image.width} × {image.height} px;"
            " expected 178 × 218"
        )
    face = image.crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
    return np.asarray(face.resize((size, size), Image.Resampling.BILINEAR))


Crop = Callable[[Image.Image, int], UInt8[np.ndarray, "size size 3"]]
CROPS: dict[str, Crop] = {"adm": adm_crop, "celeba": celeba_crop}


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"too many pixels: got {width:,} × {height:,}; expected at most {MAX_PIXELS:,}")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImage(
            f"unsupported pixels: got Pillow's mode {image.mode}, which does not define white; expected"
            " integers of 1, 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
