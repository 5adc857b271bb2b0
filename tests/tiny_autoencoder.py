"""A small autoencoder in diffusers' format, with the random parameters of the golden values."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden" / "vae.npz"


def write_autoencoder(folder):
    """Write it into a folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(GOLDEN) as golden:
        (folder / "config.json").write_text(str(golden["config"]))
        arrays = {name.removeprefix("param/"): golden[name] for name in golden if name.startswith("param/")}
    save_file(arrays, folder / "diffusion_pytorch_model.safetensors")
    return folder
