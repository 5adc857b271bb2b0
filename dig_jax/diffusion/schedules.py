"""Noise schedules of discrete-time diffusion, and the choice of timesteps to keep when respacing.

[D] is Ho et al. 2020 (Denoising Diffusion Probabilistic Models), [I] is Nichol & Dhariwal 2021 (Improved
DDPM).
"""

import re

import numpy as np
from jaxtyping import Float64

Table = Float64[np.ndarray, " steps"]


def linear_betas(num_steps: int) -> Table:
    """Return linearly increasing β_t [D §4], with the same total for any number of steps."""
    scale = 1000 / num_steps
    return np.linspace(scale * 1e-4, scale * 0.02, num_steps)


def cosine_betas(num_steps: int) -> Table:
    """Return β_t for which ᾱ_t follows f(t) / f(0) with f(t) = cos²((t/T + 0.008) / 1.008 · π/2) [I 17]."""
    f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def space_timesteps(num_steps: int, steps: int | str) -> list[int]:
    """Return the indices in 0 … num_steps-1 that a respaced process keeps, in increasing order.

    Args:
        num_steps: length of the process.
        steps: how many indices to keep. 250 or "250" spaces them evenly from the first to the last.
            "10,15,20" divides the process into three equal sections and keeps 10, 15 and 20 evenly spaced
            indices in them. "ddim50" keeps the multiples of the smallest integer stride that gives exactly 50
            (Song et al. 2021, DDIM, appendix D.2).

    Raises:
        ValueError: `steps` has another form, keeps fewer than 2 indices or more than a section has, or no
            integer stride gives that number.
    """
    if match := re.fullmatch(r"ddim(\d+)", str(steps)):
        return _strided(num_steps, int(match[1]))
    if not re.fullmatch(r"\d+(,\d+)*", str(steps)):
        raise ValueError(
            f"invalid steps: got {steps!r}; expected a number such as 50, numbers such as '10,15,20', or a"
            " stride such as 'ddim50'"
        )
    counts = [int(count) for count in str(steps).split(",")]
    if sum(counts) < 2:
        raise ValueError(f"too few steps: got {steps!r}; expected at least 2")
    kept = []
    for section, count in zip(np.array_split(np.arange(num_steps), len(counts)), counts, strict=True):
        if not 1 <= count <= len(section):
            raise ValueError(
                f"invalid steps: got {steps!r}; expected 1 … {len(section)} timesteps in each section"
            )
        stride = (len(section) - 1) / (count - 1) if count > 1 else 0.0
        # A running sum, not a product, rounds halves as the original code does.
        offsets = np.cumsum([0.0] + [stride] * (count - 1))
        kept += section[np.round(offsets).astype(int)].tolist()
    return kept


def _strided(num_steps: int, count: int) -> list[int]:
    for stride in range(1, num_steps):
        if len(kept := range(0, num_steps, stride)) == count:
            return list(kept)
    raise ValueError(
        f"invalid steps: got 'ddim{count}'; expected a count that an integer stride gives for {num_steps}"
        " timesteps"
    )
