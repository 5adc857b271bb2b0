"""Samplers by name."""

from typing import Any

from dig_jax.diffusion.options import construct
from dig_jax.diffusion.samplers.base import BaseSampler
from dig_jax.diffusion.samplers.ddim import DDIM
from dig_jax.diffusion.samplers.ddpm import DDPM
from dig_jax.diffusion.samplers.dopri5 import Dopri5
from dig_jax.diffusion.samplers.mean_flow import MeanFlowSampler
from dig_jax.diffusion.samplers.ode import DPMpp2M, Euler, Heun, UniPC
from dig_jax.diffusion.samplers.sde import DPMpp2MSDE, EDMHeun, EulerMaruyama
from dig_jax.errors import suggest

SAMPLERS: dict[str, type[BaseSampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_2m_sde": DPMpp2MSDE,
    "unipc": UniPC,
    "euler_maruyama": EulerMaruyama,
    "edm_heun": EDMHeun,
    "dopri5": Dopri5,
    "meanflow": MeanFlowSampler,
}
"""The samplers by name; their classes give the sources."""


def make_sampler(
    name: str, *, steps: int | str | None = None, clip: bool = False, **options: Any
) -> BaseSampler:
    """Return the sampler of that name.

    Args:
        name: a key of `SAMPLERS`.
        steps: number of sampling steps; None keeps the sampler's default.
        clip: whether to clip the predicted image to [-1, 1] at every step.
        options: further fields of the sampler, such as eta of "ddim".

    Raises:
        ValueError: the name is unknown, the sampler has no such option, or an option is invalid.
    """
    if name not in SAMPLERS:
        raise ValueError(
            f"unknown sampler: got {name!r}; expected one of {', '.join(SAMPLERS)}{suggest(name, SAMPLERS)}"
        )
    if steps is not None:
        options["steps"] = steps
    return construct(SAMPLERS[name], {"clip": clip, **options}, f"sampler {name!r}")
