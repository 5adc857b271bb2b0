"""What page and JSON API share: the model, requests to the engine, and PNG files with their settings."""

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dig_jax.demo.drawing import Drawer
from dig_jax.demo.engine import Engine, Job, Pixels
from dig_jax.demo.request import ImageRequest, Menu


@dataclasses.dataclass(frozen=True)
class Service:
    """A model that answers requests.

    Attributes:
        drawer: draws batches.
        engine: queues requests for the drawer.
        timeout: seconds until a request is given up.
    """

    drawer: Drawer
    engine: Engine
    timeout: float

    @property
    def menu(self) -> Menu:
        """What is on offer."""
        return self.drawer.menu

    @property
    def model(self) -> dict[str, Any]:
        """Name and training step of the model, and the name of its data."""
        sampler = self.drawer.sampler
        config = sampler.components.config
        return {"name": config.model.name, "data": config.data.name, "step": sampler.step}

    def submit(self, fields: Mapping[str, Any], *, watched: bool = False) -> Job:
        """Return a new job for JSON fields.

        Raises:
            ValueError: as `Menu.read`.
            QueueFull: too many images wait.
        """
        return self.engine.submit(self.menu.read(fields), watched=watched)

    def pictures(self, request: ImageRequest, pixels: Pixels) -> list[bytes]:
        """Return one PNG file per image of a request, with model and settings in its text."""
        files = []
        for image, seed in zip(pixels, request.seeds, strict=True):
            one = dataclasses.replace(request, seeds=(seed,))
            settings = {"model": self.model, "settings": self.menu.describe(one)}
            files.append(png(image, {"Software": "DiG-JAX", "dig_jax": json.dumps(settings)}))
        return files


def png(image: UInt8[np.ndarray, "h w c"], texts: Mapping[str, str]) -> bytes:
    """Return a PNG file of a gray or RGB image, with texts by keyword."""
    info = PngInfo()
    for keyword, text in texts.items():
        info.add_itxt(keyword, text)
    file = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "PNG", pnginfo=info)
    return file.getvalue()
