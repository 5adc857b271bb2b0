"""Gated linear attention (GLA) for JAX, in one and two dimensions."""

from pallas_gla.api import gated_gla_2d, gla, gla_2d

__all__ = ["gated_gla_2d", "gla", "gla_2d"]
__version__ = "0.1.0"
