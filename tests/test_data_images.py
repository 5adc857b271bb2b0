import io
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from dig_jax.data import images
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


def test_a_crop_of_any_shape_covers_it_and_keeps_the_aspect_ratio():
    random = np.random.default_rng(1)
    for _ in range(20):
        width, height = (int(side) for side in random.integers(5, 300, 2))
        size = tuple(int(side) for side in random.integers(4, 80, 2))
        assert adm_crop(Image.fromarray(noise(width, height)), size).shape == (*size, 3)
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None] * 4, (64, 64))
    tall = adm_crop(Image.fromarray(ramp), (32, 8))[:, 0, 0].astype(int)  # halved, and cut at the sides
    np.testing.assert_allclose(np.diff(tall), 8)


def test_gray_images_keep_their_values_and_colors_become_luma():
    gray = noise(6, 4, channels=1)
    np.testing.assert_array_equal(np.asarray(decode(encoded(Image.fromarray(gray), "PNG"), channels=1)), gray)
    red = encoded(Image.new("RGB", (2, 2), "red"), "PNG")
    assert np.asarray(decode(red, channels=1))[0, 0] == 76
    clear = encoded(Image.new("LA", (2, 2), (0, 0)), "PNG")
    assert np.asarray(decode(clear, channels=1))[0, 0] == 255


def progressive(scans):
    """A progressive JPEG whose last scan is repeated until there are so many."""
    data = encoded(Image.fromarray(noise(40, 30)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + data[-2:]


@pytest.mark.parametrize(
    "data, message",
    [
        (png_header(1, 80_000_000), "got 1 × 80,000,000 px; expected at most 65,535"),
        (progressive(2_000), "too many JPEG scans for 1,200 pixels: got 2000"),
        (
            JPEG[:2] + b"\xff\xe0\x00\x02" * 20_000 + JPEG[2:],
            "too many JPEG segments; expected at most 10000",
        ),
        (b"P3 400 400 255\n" + b"0 " * 3_000_000, "PPM of text is too large; expected at most 4 MiB"),
        (b"P6 #" + b"c" * 10_000 + b"\n2 2 255\n" + bytes(12), "expected a header of at most 4096 B"),
        (b"P6 #" + b"c" * 10_000, "expected a header of at most 4096 B"),
    ],
    ids=["side", "scans", "segments", "text", "comment", "endless comment"],
)
def test_an_image_that_would_take_minutes_or_gigabytes_is_rejected_without_decoding(
    data, message, monkeypatch
):
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(UnreadableImage, match=message):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        progressive(12),
        # A motion photo: a video follows the image, with bytes like those of a scan.
        JPEG + b"\xff\xda\x00\x00" * 10_000,
        b"P6 # a comment\n#another\n2 2\n255\n" + bytes(12),
        b"P5\n2 2\n255\n" + bytes(4),
        b"P1\n2 2\n1 0\n0 1\n",
        b"P3 1 1 255\n0 0 0\n",
    ],
    ids=["progressive", "motion photo", "comments", "gray", "bits", "text"],
)
def test_ordinary_jpegs_and_ppms_are_decoded(data):
    assert decode(data).mode == "RGB"


def test_a_limited_number_of_pixels_is_decoded_at_once():
    budget, running, most = images._Budget(100), set(), []

    def decode_one(number, pixels):
        with budget.of(pixels):
            running.add(number)
            most.append(len(running))
            time.sleep(0.01)
            running.remove(number)

    for pixels, expected in ((1000, 1), (40, 2)):
        most.clear()
        threads = [threading.Thread(target=decode_one, args=(n, pixels)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(most) <= expected and len(most) == 6


def test_strips_are_composited_as_the_whole_image(monkeypatch):
    pixels = Image.fromarray(noise(5, 11, channels=4))
    whole = np.asarray(decode(encoded(pixels, "PNG")))
    monkeypatch.setattr(images, "_STRIP", 3)
    np.testing.assert_array_equal(np.asarray(decode(encoded(pixels, "PNG"))), whole)
