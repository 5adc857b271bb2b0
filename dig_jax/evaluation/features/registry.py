"""Feature networks by name."""

from dig_jax.errors import ConfigError, alternatives, suggest
from dig_jax.evaluation.features.dinov2 import ARCHITECTURES, load_dinov2
from dig_jax.evaluation.features.inception import load_inception
from dig_jax.evaluation.features.network import FeatureNetwork

NETWORKS = ("inception", *ARCHITECTURES)


def load_features(name: str, source: str, *, preprocessing: str | None = None) -> FeatureNetwork:
    """Load a feature network with published weights.

    Args:
        name: "inception", "dinov2_vitl14" or "dinov2_vitb14".
        source: the file of weights, a folder with it, or a repository of the Hugging Face Hub ("owner/name"
            or "owner/name/file").
        preprocessing: of DINOv2: "edm2" (the default) or "dgm_eval"; see `Dinov2`.

    Raises:
        ConfigError: an unknown name, or no weights; the message says where to get them.
        CheckpointError: the file is unreadable or damaged, or holds the weights of another network.
    """
    if name in ARCHITECTURES:
        return load_dinov2(name, source, "edm2" if preprocessing is None else preprocessing)
    if name != "inception":
        raise ConfigError(
            f"unknown feature network {name!r}{suggest(name, NETWORKS)}; expected {alternatives(NETWORKS)}"
        )
    if preprocessing is not None:
        raise ConfigError(f"invalid preprocessing {preprocessing!r}: inception has one kind only")
    return load_inception(source)
