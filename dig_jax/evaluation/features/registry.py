"""Feature networks by name."""

from collections.abc import Callable

from dig_jax.errors import ConfigError, suggest
from dig_jax.evaluation.features.inception import load_inception
from dig_jax.evaluation.features.network import FeatureNetwork

NETWORKS: dict[str, Callable[[str], FeatureNetwork]] = {"inception": load_inception}


def load_features(name: str, source: str) -> FeatureNetwork:
    """Load a feature network with published weights.

    Args:
        name: "inception".
        source: the file of weights, a folder with it, or a repository of the Hugging Face Hub ("owner/name"
            or "owner/name/file").

    Raises:
        ConfigError: an unknown name, or no weights; the message says where to get them.
        CheckpointError: the file is unreadable or damaged, or holds the weights of another network.
    """
    if name not in NETWORKS:
        raise ConfigError(
            f"unknown feature network {name!r}{suggest(name, NETWORKS)}; expected {', '.join(NETWORKS)}"
        )
    return NETWORKS[name](source)
