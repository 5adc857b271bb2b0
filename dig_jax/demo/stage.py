"""What the page of a demo shows of a job: HTML while it is drawn, and files when it is done."""

import base64
import html
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dig_jax.data.class_names import display_name
from dig_jax.demo.engine import Job
from dig_jax.demo.service import Service, png

# Images up to this many pixels high are shown as blocks, not smoothed.
BLOCKY = 64

EMPTY = '<div class="empty"><span>Choose what to draw and press <b>Generate</b>.</span></div>'


class Files:
    """The PNG files of a finished job and its settings.

    Attributes:
        images: the content of each PNG file.
        captions: a title for each image.
        request: JSON fields of the request.
    """

    def __init__(self, service: Service, job: Job):
        self.images = service.pictures(job.request, job.result.result())
        self.request = service.menu.describe(job.request)
        names = service.menu.class_names
        self._title = display_name(names[job.request.label]) if names else "image"
        self._seeds = job.request.seeds
        self.captions = [f"{self._title}, seed {seed}" for seed in self._seeds]
        self._settings = json.dumps({"model": service.model, "settings": self.request}, indent=2)

    def write(self, folder: Path) -> tuple[list[Path], Path, Path]:
        """Write all files; return the images, the archive of all images, and the settings."""
        stem = re.sub(r"\W+", "_", self._title.casefold())[:40]
        paths = [folder / f"{stem}_{seed}.png" for seed in self._seeds]
        for path, image in zip(paths, self.images, strict=True):
            path.write_bytes(image)
        settings = folder / f"{stem}.json"
        settings.write_text(self._settings, "utf-8")
        if len(paths) == 1:
            return paths, paths[0], settings
        archive = folder / f"{stem}.zip"
        with zipfile.ZipFile(archive, "w") as target:
            for path in (*paths, settings):
                target.write(path, path.name)
        return paths, archive, settings


def heading(service: Service) -> str:
    """Return the title of the page."""
    model = service.model
    title = html.escape(f"{model['name']} on {model['data']}")
    return (
        f"<h1>{title}</h1><p>Step {model['step']:,} of training. The same settings give the same image.</p>"
    )


def progress(job: Job, evaluations: int, service: Service) -> str:
    """Return the stage of a job that waits or is drawn.

    Args:
        job: the job.
        evaluations: evaluations of the network per image.
        service: what draws it.
    """
    images = [b"" if frame is None else png(frame, {}) for frame in job.frames]
    if job.evaluations:
        text = f"evaluation {job.evaluations} of {evaluations}"
    elif waiting := service.engine.waiting:
        text = f"{waiting} images in the queue"
    else:
        text = "starting; new settings are compiled first"
    bar = f'<progress max="{evaluations}" value="{job.evaluations}"></progress>'
    return _tiles(images, job) + f'<div class="bar">{bar}<span>{text}</span></div>'


def result(files: Files, job: Job) -> str:
    """Return the stage of a finished job, with the same request in Python and for the JSON API."""
    names = {"class": "labels"}
    options = ", ".join(f"{names.get(name, name)}={value!r}" for name, value in files.request.items())
    body = json.dumps(files.request)
    code = html.escape(
        f"images = dig_jax.load(WORKDIR)({options})\n\n"
        f"curl ADDRESS/api/images -H 'Content-Type: application/json' -d '{body}'"
    )
    return (
        _tiles(files.images, job) + f"<details><summary>The same in code</summary><pre>{code}</pre></details>"
    )


def _tiles(images: Sequence[bytes], job: Job) -> str:
    height, width = job.request.program.size
    blocky = " blocky" if height <= BLOCKY else ""
    tiles = []
    for image, seed in zip(images, job.request.seeds, strict=True):
        source = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = f'<img src="{source}" alt="image of seed {seed}">' if image else "<i></i>"
        tiles.append(f"<figure>{content}<figcaption>seed {seed}</figcaption></figure>")
    style = f"--ratio: {width} / {height}; --columns: {min(len(tiles), 4)}"
    return f'<div class="tiles{blocky}" style="{style}">{"".join(tiles)}</div>'
