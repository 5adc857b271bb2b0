"""PNG files of images: labeled grids, pairs with nearest neighbors, denoising strips; written atomically."""

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from dig_jax.files.atomic import replacing

# A gray background shows where white strokes reach the edge of an image.
_BACKGROUND, _INK = (222, 225, 231), (30, 33, 40)
_MARGIN = 12
# Small images are enlarged by the largest integer factor that keeps them within this many pixels.
_CELL = 80
# Maximum side of the images in a small grid, in pixels.
_SMALL = 48


@dataclasses.dataclass(frozen=True)
class GridLayout:
    """Positions of `count` images of equal size in a grid, in pixels of the grid.

    height, width: size of one image.
    left, top: position of the first cell.
    title: height of the title above each image.
    """

    count: int
    columns: int
    height: int
    width: int
    left: int = _MARGIN
    top: int = _MARGIN
    title: int = 0

    @property
    def gutter(self) -> int:
        """Space between two cells."""
        return max(4, self.width // 25)

    @property
    def rows(self) -> int:
        """Number of rows; the last may be incomplete."""
        return -(-self.count // self.columns)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the grid with its margins."""
        x, y = self.corner(self.rows * self.columns - 1)
        return x + self.width + _MARGIN, y + self.height + _MARGIN

    def corner(self, index: int) -> tuple[int, int]:
        """Return (x, y) of the upper left pixel of image `index`, counted row by row."""
        row, column = divmod(index, self.columns)
        x = self.left + column * (self.width + self.gutter)
        y = self.top + row * (self.title + self.height + self.gutter) + self.title
        return x, y


def save_grid(path: str | os.PathLike, images: UInt8[np.ndarray, "n h w c"], **options) -> None:
    """Write `draw_grid(images, **options)` to a PNG file.

    Raises:
        ValueError: as `draw_grid`.
        OSError: the file cannot be written; an existing file is kept.
    """
    with replacing(path) as file:
        draw_grid(images, **options).save(file, format="PNG")


def draw_grid(
    images: UInt8[np.ndarray, "n h w c"],
    *,
    columns: int,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    titles: Sequence[str] = (),
    caption: str = "",
    scale: int | None = None,
) -> Image.Image:
    """Draw a grid of images, filled row by row, with all text outside of the images.

    Args:
        images: one or more grayscale (c = 1) or RGB (c = 3) images.
        columns: number of images per row.
        row_labels: one label to the left of each row, or none.
        column_labels: one label above each column, or none.
        titles: one title above each image, cut to its width, or none.
        caption: text below the grid, wrapped.
        scale: integer factor of enlargement; by default, small images are enlarged to about 80 pixels.

    Raises:
        ValueError: there is no image, or the number of labels or titles does not match.
    """
    images = _enlarge(images, scale)
    count, height, width, _ = images.shape
    _check_counts(count, columns, row_labels=row_labels, column_labels=column_labels, titles=titles)
    font = _font(min(24, max(12, width // 6)))
    line = math.ceil(1.4 * font.size)
    row_labels = [_cut(text, font, max(160, width)) for text in row_labels]
    layout = GridLayout(
        count=count,
        columns=columns,
        height=height,
        width=width,
        left=_MARGIN + (_extent(row_labels, font) + line // 2 if row_labels else 0),
        top=_MARGIN + (line if column_labels else 0),
        title=line if titles else 0,
    )
    picture = Image.new("RGB", layout.size, _BACKGROUND)
    for index, image in enumerate(images):
        picture.paste(Image.fromarray(image), layout.corner(index))
    draw = ImageDraw.Draw(picture)
    for row, text in enumerate(row_labels):
        x, y = layout.corner(row * columns)
        draw.text((x - line // 2, y + height / 2), text, _INK, font, anchor="rm")
    for column, text in enumerate(column_labels):
        x = layout.corner(column)[0] + width / 2
        draw.text((x, layout.top - line / 2), _cut(text, font, width), _INK, font, anchor="mm")
    for index, text in enumerate(titles):
        x, y = layout.corner(index)
        draw.text((x, y - line / 2), _cut(text, font, width), _INK, font, anchor="lm")
    return _with_caption(picture, caption, font, layout.left)


def save_small_grid(path: str | os.PathLike, images: UInt8[np.ndarray, "n h w c"], **options) -> None:
    """Write a grid as `save_grid` does, with images reduced to at most 48 pixels per side."""
    factor = _SMALL / max(images.shape[1:3])
    if factor < 1:
        count, height, width, channels = images.shape
        height, width = (max(1, round(factor * length)) for length in (height, width))
        reduced = [
            Image.fromarray(image.squeeze(-1) if channels == 1 else image).resize(
                (width, height), Image.Resampling.LANCZOS
            )
            for image in images
        ]
        images = np.stack([np.asarray(image) for image in reduced]).reshape(count, height, width, channels)
    save_grid(path, images, scale=max(1, int(factor)), **options)


def save_pair_grid(
    path: str | os.PathLike,
    images: UInt8[np.ndarray, "n h w c"],
    neighbors: UInt8[np.ndarray, "_ _ _ _"],
    *,
    columns: int,
    row_labels: Sequence[str] = (),
    caption: str = "In each pair, left: a generated image; right: the training image nearest to it.",
) -> None:
    """Write a grid as `save_grid` does, with a neighbor to the right of each image, to make copies visible.

    Raises:
        ValueError: the shapes differ, or as `draw_grid`.
        OSError: as `save_grid`.
    """
    if images.shape != neighbors.shape:
        raise ValueError(
            f"shapes of images and neighbors differ: got {images.shape} and {neighbors.shape}; expected equal"
            " shapes"
        )
    left, right = _enlarge(images), _enlarge(neighbors)
    pairs = np.concatenate([left, np.full_like(left[:, :, :1], 255), right], axis=2)
    save_grid(path, pairs, columns=columns, row_labels=row_labels, caption=caption, scale=1)


def save_denoising(
    path: str | os.PathLike,
    trajectory: UInt8[np.ndarray, "s n h w c"],
    *,
    row_labels: Sequence[str] = (),
    frames: int = 10,
    caption: str = "",
) -> None:
    """Write a grid of the denoising steps: one row per image, `frames` evenly spaced steps.

    Args:
        path: PNG file.
        trajectory: the images at all steps, as returned by `Sampler.trajectory`.
        row_labels: one label per image, or none.
        frames: maximum number of steps in the grid.
        caption: text below the grid.

    Raises:
        ValueError: as `draw_grid`.
        OSError: as `save_grid`.
    """
    steps = np.unique(np.linspace(0, len(trajectory) - 1, frames).round().astype(int))
    images = trajectory[steps].swapaxes(0, 1)  # [n, frames, h, w, c]
    save_grid(
        path,
        images.reshape(-1, *images.shape[2:]),
        columns=len(steps),
        row_labels=row_labels,
        column_labels=[str(step) for step in steps],
        caption=caption,
    )


def _enlarge(images: UInt8[np.ndarray, "n h w c"], scale: int | None = None) -> UInt8[np.ndarray, "n H W 3"]:
    """Return RGB images enlarged by an integer factor, by default to about the size of a cell."""
    count, height, width, channels = images.shape
    if not count or channels not in (1, 3):
        raise ValueError(
            f"invalid images: got shape {images.shape}; expected one or more with 1 or 3 channels"
        )
    scale = scale or max(1, _CELL // max(height, width))
    images = np.broadcast_to(images, (count, height, width, 3))
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _check_counts(count: int, columns: int, **texts: Sequence[str]) -> None:
    if columns < 1:
        raise ValueError(f"invalid columns: got {columns}; expected at least 1")
    numbers = {"row_labels": -(-count // columns), "column_labels": columns, "titles": count}
    for name, given in texts.items():
        if given and len(given) != numbers[name]:
            raise ValueError(f"invalid {name}: got {len(given)}; expected {numbers[name]} for this grid")


def _with_caption(picture: Image.Image, caption: str, font: ImageFont.FreeTypeFont, left: int) -> Image.Image:
    """Return the picture with a caption below it, on a wider background if the caption needs it."""
    line = math.ceil(1.4 * font.size)
    lines = _wrap(caption, font, max(picture.width - left - _MARGIN, 16 * line))
    width = max(picture.width, left + _extent(lines, font) + _MARGIN)
    captioned = Image.new("RGB", (width, picture.height + line * len(lines)), _BACKGROUND)
    captioned.paste(picture)
    for number, text in enumerate(lines):
        y = picture.height + line * (number + 0.5)
        ImageDraw.Draw(captioned).text((left, y), text, _INK, font, anchor="lm")
    return captioned


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # always, if a size is given
    return font


def _extent(texts: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(max(map(font.getlength, texts), default=0))


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text, cut to a width in pixels with three dots at the end."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_cut(line, font, width) for line in lines]
