"""Checkpoints of flow matching: SiT, REPA and LightningDiT, which are DiTs with another time and sign.

With t = 1 for noise, our velocity is ε - x, and the time embedding gets 1000·t. SiT (Ma et al. 2024) and
LightningDiT (Yao et al. 2025) count from noise to data: the network gets 1 - t and predicts x - ε. REPA
(Yu et al. 2025) gets t and predicts ε - x. So the option `time_input` says what the embedding gets, and the
final layer changes its sign.
"""

import dataclasses
from typing import Literal

import numpy as np

from dig_jax.config import Config
from dig_jax.convert.sources import UpstreamParams
from dig_jax.files.safetensors import StoredArray

TimeInput = Literal["noise", "data"]
_OUTPUTS = ("final_layer.linear.weight", "final_layer.linear.bias")


def time_input(source: UpstreamParams, name: str) -> TimeInput | None:
    """Return what the network's time embedding gets: "data", "noise", or None for a model of DDPM.

    Args:
        source: the parameters.
        name: name of the file or of the model, which identifies a SiT as the saved arguments do.
    """
    model = source.hints.get("model")
    names = [name, model if isinstance(model, str) else ""]
    if source.has_projectors:
        return "noise"
    is_flow = any(one.lower().startswith(("sit", "lightningdit")) for one in names)
    return "data" if is_flow or "blocks.0.mlp.w12.weight" in source.stored else None


def with_our_sign(source: UpstreamParams, given: TimeInput | None) -> UpstreamParams:
    """Return parameters that predict ε - x."""
    if given != "data":
        return source
    negated = {name: _negated(source.stored[name]) for name in _OUTPUTS if name in source.stored}
    return dataclasses.replace(source, stored={**source.stored, **negated})


def as_flow(settings: Config, given: TimeInput | None) -> Config:
    """Return the config with flow matching and the Euler method, with which these models are sampled."""
    if given is None:
        return settings
    return dataclasses.replace(
        settings,
        model=dataclasses.replace(settings.model, time_input=given),
        diffusion=dataclasses.replace(settings.diffusion, process="flow"),
        sampling=dataclasses.replace(settings.sampling, sampler="euler"),
    )


def _negated(array: StoredArray) -> StoredArray:
    def read() -> np.ndarray:
        return -array.read()

    return StoredArray(array.shape, array.dtype, read)
