import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dig_jax.data.images import CROPS, MAX_PIXELS, UnreadableImage, adm_crop, celeba_crop, decode


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(image, kind, **options):
    return np.asarray(decode(encoded(image, kind, **options)))


def png_header(width, height):
    """A PNG that says how large it is, and has only its first pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(bytes(9))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def by_adm_description(image, size):
    """Halve by box averages while it is twice too large; shorter side to `size`, bicubic; cut the middle."""
    width, height = image.size
    while width >= 2 * size and height >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    factor = size / min(width, height)
    pixels = np.array(image.resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC))
    above, before = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[above : above + size, before : before + size]


def test_the_center_crop_is_adms_byte_for_byte_on_fifty_random_sizes():
    random = np.random.default_rng(0)
    for seed in range(50):
        width, height = (int(side) for side in random.integers(5, 400, 2))
        size = int(random.choice([8, 31, 32, 64, 256]))
        image = Image.fromarray(noise(width, height, seed=seed))
        crop = adm_crop(image, size)
        assert crop.shape == (size, size, 3)
        np.testing.assert_array_equal(crop, by_adm_description(image, size), err_msg=f"{width}×{height}")


def test_an_image_of_the_right_size_is_left_as_it_is():
    pixels = noise(32, 32)
    np.testing.assert_array_equal(adm_crop(Image.fromarray(pixels), 32), pixels)


def test_faces_are_cropped_around_row_121_and_column_89():
    pixels = noise(178, 218)
    face = celeba_crop(Image.fromarray(pixels), 128)
    np.testing.assert_array_equal(face, pixels[57:185, 25:153])
    small = Image.fromarray(face).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(celeba_crop(Image.fromarray(pixels), 64), np.asarray(small))
    with pytest.raises(UnreadableImage, match="got 178 × 217 px; expected 178 × 218"):
        celeba_crop(Image.fromarray(pixels[1:]), 64)


@pytest.mark.parametrize("crop", CROPS)
def test_crops_can_be_of_any_image_that_is_decoded(crop):
    image = decode(encoded(Image.fromarray(noise(178, 218)), "JPEG"))
    assert CROPS[crop](image, 64).dtype == np.uint8


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_files_are_decoded_exactly(kind):
    pixels = noise(7, 5)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decoded(Image.fromarray(pixels), kind, **lossless), pixels)


def test_gray_palette_and_16_bits_become_rgb():
    gray = noise(6, 4, channels=1)
    expected = np.repeat(gray[..., None], 3, axis=-1)
    np.testing.assert_array_equal(decoded(Image.fromarray(gray), "PNG"), expected)
    np.testing.assert_array_equal(decoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG"), expected)
    palette = Image.fromarray(noise(6, 4)).quantize(8)
    np.testing.assert_array_equal(decoded(palette, "PNG"), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(gray > 127)
    np.testing.assert_array_equal(decoded(bits, "PNG")[..., 0], np.where(gray > 127, 255, 0))


def test_cmyk_jpegs_become_rgb():
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    np.testing.assert_allclose(decoded(cmyk, "JPEG")[8, 8].astype(int), [0, 255, 255], atol=3)


def test_transparency_is_composited_on_white():
    pixels = noise(4, 4, channels=4)
    pixels[..., 3] = [0, 255, 0, 255]
    rgb = decoded(Image.fromarray(pixels), "PNG")
    assert (rgb[:, ::2] == 255).all()
    np.testing.assert_array_equal(rgb[:, 1::2], pixels[:, 1::2, :3])
    pixels[..., 3] = 128
    expected = pixels[..., :3] * (128 / 255) + 255 * (127 / 255)
    np.testing.assert_allclose(decoded(Image.fromarray(pixels), "PNG"), expected, atol=1)
    palette = Image.fromarray(np.uint8([[0, 1]]), "P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    np.testing.assert_array_equal(decoded(palette, "PNG", transparency=0), [[[255] * 3, [10, 20, 30]]])


def test_the_exif_orientation_is_applied_unless_upright_is_false():
    pixels = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    data = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(data)), np.rot90(pixels, -1))
    np.testing.assert_array_equal(np.asarray(decode(data, upright=False)), pixels)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_yield_their_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    np.testing.assert_allclose(np.asarray(decode(data))[0, 0].astype(int), [255, 0, 0], atol=3)


JPEG = encoded(Image.fromarray(noise(40, 30)), "JPEG")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "expected JPEG, PNG"),
        (b"not an image", "expected JPEG, PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "expected JPEG, PNG"),
        (JPEG[:200], "expected JPEG|truncated|OSError"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (png_header(60_000, 60_000), "DecompressionBomb"),
        (png_header(10_000, 10_000), "got 10,000 × 10,000; expected at most|DecompressionBombWarning"),
        (png_header(10, 10), "OSError|SyntaxError"),
        (
            encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"),
            "got Pillow's mode F, which does not define white",
        ),
    ],
)
def test_an_unreadable_image_says_why_in_one_line(data, message):
    with pytest.raises(UnreadableImage, match=message) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_huge_after_resizing_is_rejected():
    assert MAX_PIXELS < 5000 * 256 * 256
    with pytest.raises(UnreadableImage, match="got 1,280,000 × 256; expected at most"):
        adm_crop(Image.new("RGB", (5000, 1)), 256)
