"""PNG pictures: labelled grids of images, pairs with their nearest neighbours, denoising strips.

Every file is written beside its place under another name and then moved there, so that a reader, or a run
that is killed, never meets half a picture.
"""

import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from dig_jax.files.atomic import replacing

# The paper is grey so that white strokes which reach the edge of an image end there.
_PAPER, _INK = (222, 225, 231), (30, 33, 40)
_MARGIN = 12
# Tiny images are enlarged by the largest whole number that keeps them within this many pixels.
_CELL = 80
# The side of images in a small grid.
_SMALL = 48


@dataclasses.dataclass(frozen=True)
class GridLayout:
    """Where `count` equal images stand in a grid; all lengths in pixels of the picture.

    height, width: of one image.
    left, top: of the first cell.
    title: room above each image.
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
        """Free width between two cells."""
        return max(4, self.width // 25)

    @property
    def rows(self) -> int:
        """Number of rows, the last of which may be incomplete."""
        return -(-self.count // self.columns)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the picture, its margins included."""
        x, y = self.corner(self.rows * self.columns - 1)
        return x + self.width + _MARGIN, y + self.height + _MARGIN

    def corner(self, index: int) -> tuple[int, int]:
        """(x, y) of the upper left pixel of image `index`, counted along rows."""
        row, column = divmod(index, self.columns)
        x = self.left + column * (self.width + self.gutter)
        y = self.top + row * (self.title + self.height + self.gutter) + self.title
        return x, y


def save_grid(path: str | os.PathLike, images: UInt8[np.ndarray, "n h w c"], **options) -> None:
    """Writes `draw_grid(images, **options)` to a PNG file.

    Raises:
        ValueError: as `draw_grid`.
        OSError: if the file cannot be written; an older file of that name then stays as it is.
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
    """A grid of images, filled row by row, with text around but never over them.

    Args:
        images: at least one, grey (c = 1) or RGB (c = 3).
        columns: images per row.
        row_labels: one at the left of each row, or none.
        column_labels: one above each column, or none.
        titles: one above each image, cut to its width, or none.
        caption: below the grid, broken into lines.
        scale: whole factor by which every pixel is repeated; by default tiny images become about 80 pixels
            large and others stay as they are.

    Raises:
        ValueError: if there is no image, or the number of labels or titles does not fit.
    """
    images = _enlarged(images, scale)
    count, height, width, _ = images.shape
    _check_counts(count, columns, row_labels=row_labels, column_labels=column_labels, titles=titles)
    font = ImageFont.load_default(min(24, max(12, width // 6)))
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
    picture = Image.new("RGB", layout.size, _PAPER)
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
    """`save_grid` with images of at most 48 pixels a side, for looking at many grids at once.

    Raises:
        ValueError, OSError: as `save_grid`.
    """
    factor = _SMALL / max(images.shape[1:3])
    if factor < 1:
        size = tuple(max(1, round(factor * length)) for length in images.shape[2:0:-1])
        grey = images.shape[3] == 1
        reduced = [
            np.asarray(
                Image.fromarray(image[..., 0] if grey else image).resize(size, Image.Resampling.LANCZOS)
            )
            for image in images
        ]
        images = np.stack(reduced).reshape(len(images), *size[::-1], images.shape[3])
    save_grid(path, images, scale=max(1, int(factor)), **options)


def save_pair_grid(
    path: str | os.PathLike,
    images: UInt8[np.ndarray, "n h w c"],
    neighbours: UInt8[np.ndarray, "_ _ _ _"],
    *,
    columns: int,
    row_labels: Sequence[str] = (),
    caption: str = "In each pair: a generated image, and to its right the training image nearest to it.",
) -> None:
    """Writes the grid of `save_grid` with each image's neighbour at its right, to make copies visible.

    Raises:
        ValueError: if the shapes differ, or as `draw_grid`.
        OSError: as `save_grid`.
    """
    if images.shape != neighbours.shape:
        raise ValueError(f"images and neighbours differ in shape: {images.shape} and {neighbours.shape}")
    left, right = _enlarged(images), _enlarged(neighbours)
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
    """Writes how images come out of noise: a row for each, `frames` evenly spaced steps from first to last.

    Args:
        path: of the PNG file.
        trajectory: all steps of all images.
        row_labels: one for each image.
        frames: number of steps shown, or all if there are fewer.
        caption: below the strip.

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


def _enlarged(images: UInt8[np.ndarray, "n h w c"], scale: int | None = None) -> UInt8[np.ndarray, "n H W 3"]:
    """The images in RGB with each pixel repeated, by default until they are about as large as a cell."""
    count, height, width, channels = images.shape
    if not count or channels not in (1, 3):
        raise ValueError(f"images must be one or more with 1 or 3 channels, got shape {images.shape}")
    scale = scale or max(1, _CELL // max(height, width))
    images = np.broadcast_to(images, (count, height, width, 3))
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _check_counts(count: int, columns: int, **texts: Sequence[str]) -> None:
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    numbers = {"row_labels": -(-count // columns), "column_labels": columns, "titles": count}
    for name, given in texts.items():
        if given and len(given) != numbers[name]:
            raise ValueError(f"{name} must be {numbers[name]} texts for this grid, got {len(given)}")


def _with_caption(picture: Image.Image, caption: str, font: ImageFont.FreeTypeFont, left: int) -> Image.Image:
    """The picture on a sheet that has room for the caption below, and if need be at the right."""
    line = math.ceil(1.4 * font.size)
    lines = _wrap(caption, font, max(picture.width - left - _MARGIN, 16 * line))
    width = max(picture.width, left + _extent(lines, font) + _MARGIN)
    sheet = Image.new("RGB", (width, picture.height + line * len(lines)), _PAPER)
    sheet.paste(picture)
    for number, text in enumerate(lines):
        y = picture.height + line * (number + 0.5)
        ImageDraw.Draw(sheet).text((left, y), text, _INK, font, anchor="lm")
    return sheet


def _extent(texts: Sequence[str], font: ImageFont.FreeTypeFont) -> int:
    return math.ceil(max(map(font.getlength, texts), default=0))


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, or as much of it as fits into this width, and three dots."""
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
