"""From an encoded image to the square of pixels that a model sees: decoding and cropping, by Pillow."""

import io
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

# Told apart by content, not by file name. Others that Pillow knows run programs (EPS) or are no pictures.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Pillow's own bound: a quarter of a gigabyte as RGB. The header says so before anything is decoded.
MAX_PIXELS = 89_478_485
MAX_BYTES = 2**28


class UnreadableImage(Exception):
    """An image that cannot be used: damaged, too large, or of a kind that has no defined colours."""


def decode(data: bytes, *, upright: bool = True) -> Image.Image:
    """The picture in a file, as RGB.

    Grey is repeated, palettes are looked up, CMYK is converted without a colour profile, 16 bits are cut to
    8; what is transparent stands on white; of an animation it is the first frame.

    Args:
        data: the file's content.
        upright: turn it as its EXIF orientation says, as every viewer does.

    Raises:
        UnreadableImage: says why.
    """
    if len(data) > MAX_BYTES:
        raise UnreadableImage(f"the file is larger than {MAX_BYTES // 2**20} MiB")
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
        raise UnreadableImage(f"it is none of {', '.join(FORMATS)}, or its header is damaged") from None
    except Exception as error:  # decoders meet damage with errors of any kind
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def adm_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The centre of an image as ADM (Dhariwal & Nichol 2021), DiT and DiG crop it.

    Halved by box averages while the shorter side is at least 2·size, resized bicubically until it is `size`,
    and then cut.

    Raises:
        UnreadableImage: it is so long and thin that resized it would be too large.
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
    """The face in an aligned CelebA image, as DDIM (Song et al. 2021) and DiG crop it.

    The 128 × 128 pixels around (89, 121), resized bilinearly.

    Raises:
        UnreadableImage: it is not one of those, which are 178 × 218.
    """
    if image.size != (178, 218):
        raise UnreadableImage(f"it is {image.width} × {image.height} px; aligned CelebA images are 178 × 218")
    face = image.crop((89 - 64, 121 - 64, 89 + 64, 121 + 64))
    return np.asarray(face.resize((size, size), Image.Resampling.BILINEAR))


Crop = Callable[[Image.Image, int], UInt8[np.ndarray, "size size 3"]]
CROPS: dict[str, Crop] = {"adm": adm_crop, "celeba": celeba_crop}


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width:,} × {height:,} px are more than {MAX_PIXELS:,}")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UnreadableImage(f"pixels of Pillow's mode {image.mode} have no defined white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
