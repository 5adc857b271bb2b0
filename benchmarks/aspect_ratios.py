"""A model of square digits, fine-tuned from 8 to 16 px and sampled at other aspect ratios, as one picture.

python benchmarks/aspect_ratios.py --folder=runs/aspect_ratios --write

It writes the digits as PNG files, trains at 8 px, fine-tunes at 16 px with `init_from`, and draws the same
seeds at 16 × 16, 32 × 16 and 16 × 48 pixels. --write stores docs/images/aspect_ratios.png. Finished runs in
the folder are not trained again.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from benchmarks.digits import prepare, settings_of  # noqa: E402
from dig_jax import config  # noqa: E402
from dig_jax.data.digits import digits  # noqa: E402
from dig_jax.evaluation.digits import score_digits  # noqa: E402
from dig_jax.files.paths import to_path  # noqa: E402
from dig_jax.sampling.sampler import Sampler, load  # noqa: E402
from dig_jax.training.train import train  # noqa: E402

PICTURE = pathlib.Path(__file__).parents[1] / "docs/images/aspect_ratios.png"
SIZES = ((16, 16), (32, 16), (16, 48))

VARIANTS = (
    ("absolute positions", {"positions": "absolute", "time_shift": 1.0}),
    ("interpolated positions", {"positions": "interpolated", "time_shift": 1.0}),
    ("absolute, time shift", {"positions": "absolute", "time_shift": 0.0}),
    ("interpolated, time shift", {"positions": "interpolated", "time_shift": 0.0}),
)
_ZOOM, _MARGIN, _CAPTION = 3, 6, 14


def write_images(folder: pathlib.Path) -> None:
    """Write the training digits, 8×8 gray, in one directory per class."""
    source = digits("train")
    for index in range(len(source)):
        example = source[index]
        place = folder / source.class_names[int(example["label"])]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(example["image"][..., 0]).save(place / f"{index:04}.png")


def settings_at(side: int, images: pathlib.Path, steps: int, init_from: str) -> config.Config:
    """Return the config of the digits at a size in pixels."""
    settings = settings_of("modern", 0, **{"training.steps": steps})
    options = {"path": str(images), "image_size": side, "channels": 1}
    return dataclasses.replace(
        settings,
        init_from=init_from or None,
        data=dataclasses.replace(settings.data, name="image_folder", flip=False, options=options),
        model=dataclasses.replace(settings.model, gate_normalizer="grid", positions="interpolated"),
    )


def draw(sampler: Sampler, size: tuple[int, int], positions: str, time_shift: float) -> np.ndarray:
    """Return one image of each digit; positions differ only at other sizes than the training images'."""
    settings = sampler.components.config
    model = dataclasses.replace(settings.model, positions=positions)
    components = sampler.components.with_config(dataclasses.replace(settings, model=model))
    return Sampler(components, sampler.params, step=0)(
        list(range(10)), seeds=list(range(10)), size=size, time_shift=time_shift
    )


def row_of(images: UInt8[np.ndarray, "n h w 1"], caption: str) -> Image.Image:
    """Return the images side by side below a caption."""
    count, height, width, _ = images.shape
    step = _ZOOM * width + _MARGIN
    row = Image.new("L", (count * step + _MARGIN, _ZOOM * height + _CAPTION + 2 * _MARGIN), 255)
    ImageDraw.Draw(row).text((_MARGIN, 2), caption, fill=0)
    for number, image in enumerate(images[..., 0]):
        large = Image.fromarray(image).resize((_ZOOM * width, _ZOOM * height), Image.Resampling.NEAREST)
        row.paste(large, (_MARGIN + number * step, _CAPTION + _MARGIN))
    return row


def picture(sampler: Sampler) -> Image.Image:
    """Return the samples of all sizes and variants."""
    rows = []
    for height, width in SIZES:
        for name, variant in VARIANTS[:1] if height == width else VARIANTS:
            caption = f"{height} x {width}: {name}" if height != width else f"{height} x {width}, as trained"
            rows.append(row_of(draw(sampler, (height, width), **variant), caption))
    whole = Image.new("L", (max(row.width for row in rows), sum(row.height for row in rows)), 255)
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    return whole


def main() -> None:
    """Run the benchmark on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True)
    parser.add_argument("--steps", type=int, nargs=2, default=(1500, 1000), help="at 8 px and at 16 px")
    parser.add_argument("--write", action="store_true", help=f"store {PICTURE.name}")
    options = parser.parse_args()
    prepare()
    folder = pathlib.Path(options.folder).absolute()
    if not (folder / "images").exists():
        write_images(folder / "images")
    source = ""
    for side, steps in zip((8, 16), options.steps, strict=True):
        began, workdir = time.monotonic(), folder / f"{side}px"
        train(settings_at(side, folder / "images", steps, source), to_path(workdir))
        sampler = load(workdir)
        labels, seeds = sampler.resolve(None, np.arange(500))
        images = sampler(labels, seeds=seeds)
        small = images if side == 8 else _halved(images)
        row = {"side": side, "steps": steps, "seconds": round(time.monotonic() - began)}
        print(json.dumps({**row, **score_digits(small, labels)}), flush=True)
        source = str(workdir)
    drawn = picture(sampler)
    drawn.save(folder / PICTURE.name)
    if options.write:
        drawn.save(PICTURE)


def _halved(images: UInt8[np.ndarray, "n h w 1"]) -> UInt8[np.ndarray, "n h/2 w/2 1"]:
    """Return the images at the size that the scores of the digits expect."""
    count, height, width, _ = images.shape
    means = images.reshape(count, height // 2, 2, width // 2, 2, 1).mean((2, 4))
    return np.rint(means).astype(np.uint8)


if __name__ == "__main__":
    main()
