"""Open checkpoints of other programs in any supported format, under upstream's names and layouts."""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dig_jax.convert.diffusers import as_upstream
from dig_jax.errors import CheckpointError, ConfigError, InvalidFile
from dig_jax.files.paths import Path
from dig_jax.files.pytorch.pickle_reader import Opaque
from dig_jax.files.safetensors import StoredArray
from dig_jax.files.weights import Weights, find_weights, open_weights, read_json_object

log = logging.getLogger(__name__)

# Every model has one of these, under upstream's, diffusers' or DiS's names. What stands before it is a tree.
_FIRST_NAMES = ("x_embedder.proj.weight", "pos_embed.proj.weight", "patch_embed.proj.weight")
# The tree to take by default, if several hold a model.
_PREFERRED = ("ema", "model", "state_dict")
_OPTIMIZERS = ("opt", "optimizer", "optimizer_states")
# Networks that only the training needs: REPA (Yu et al. 2024) aligns hidden states with another encoder.
_TRAINING_ONLY = ("projectors.",)


@dataclasses.dataclass(frozen=True)
class UpstreamParams:
    """Parameters under upstream's names.

    stored: the arrays by name.
    tree: what stands before the names in the file, such as "ema" or "state_dict.model"; "" for nothing.
    hints: arguments of the training run or diffusers' config, if there are any.
    has_projectors: whether the model was trained with REPA.
    """

    stored: Mapping[str, StoredArray]
    tree: str
    hints: dict[Any, Any]
    has_projectors: bool = False

    @property
    def is_average(self) -> bool:
        """Whether the name of the tree says that it is an average of the parameters."""
        return "ema" in re.split(r"[._]", self.tree)


@contextlib.contextmanager
def open_upstream(path: Path, tree: str | None = None) -> Iterator[UpstreamParams]:
    """Open a PyTorch file, a safetensors file, an index of several, or a folder written by diffusers.

    Args:
        tree: a part of what stands before the names of the model's parameters, such as "model" or
            "state_dict.ema_model". Only needed if several trees hold a model; even then the default is "ema",
            "model" or "state_dict".

    Raises:
        CheckpointError: the file is missing, invalid or unsupported, or the tree is unknown.
        ConfigError: several trees hold a model, and `tree` does not choose one.
    """
    if path.is_dir():
        path = find_weights(path, "transformer")
        log.info("reading %s", path)
    try:
        with open_weights(path) as weights:
            chosen = _choose(weights.names, tree, path)
            _log_rest(weights.names, chosen)
            found = as_upstream(weights.below(chosen))
            stored = _without_training_networks(found)
            yield UpstreamParams(stored, chosen, _hints(weights, path), len(stored) < len(found))
    except InvalidFile as error:
        raise CheckpointError(f"{path}: {error}") from error


def _trees(names: Collection[str]) -> list[str]:
    """Return what stands before the names of each model in a file; "" for a model without a prefix."""
    return list(
        dict.fromkeys(
            name.removesuffix(first).removesuffix(".")
            for name in names
            for first in _FIRST_NAMES
            if name == first or name.endswith(f".{first}")
        )
    )


def _choose(names: Collection[str], tree: str | None, path: Path) -> str:
    """Return the tree to read: the given one, the only one with a model, or the preferred one."""
    found = _trees(names)
    if not found:  # reading the tree tells what is missing
        default = (first for first in _PREFERRED if any(name.startswith(f"{first}.") for name in names))
        return tree or next(default, "")
    matching = [name for name in found if tree is None or f".{tree}." in f".{name}."]
    if tree in matching:
        return tree
    if len(matching) > 1 and tree is None:
        preferred = ([name for name in matching if name.split(".")[0] == first] for first in _PREFERRED)
        matching = next(filter(None, preferred), matching)
    if len(matching) == 1:
        return matching[0]
    choices = ", ".join(name for name in found if name) or "none, because names have no prefix"
    if not matching:
        raise CheckpointError(f"{path}: unknown tree {tree!r}; expected one of: {choices}")
    raise ConfigError(f"{path} holds several models; expected --tree with one of: {choices}")


def _hints(weights: Weights, path: Path) -> dict[Any, Any]:
    content = weights.content if isinstance(weights.content, dict) else {}
    if isinstance(arguments := content.get("args"), Opaque):
        return arguments.state
    config = read_json_object(path.with_name("config.json"))
    return config if "num_attention_heads" in config else {}


def _log_rest(names: Collection[str], chosen: str) -> None:
    """Tell which arrays beside the model's tree are not converted, except other copies of the model."""
    elsewhere = [tree for tree in (*_PREFERRED, *_OPTIMIZERS) if not f"{chosen}.".startswith(f"{tree}.")]
    known = tuple(f"{tree}." for tree in (*_trees(names), *elsewhere) if tree)
    rest = [name for name in names if not name.startswith(known)]
    if chosen and rest:
        log.info("ignored %d arrays outside %s, such as %s", len(rest), chosen, rest[0][:100])


def _without_training_networks(stored: Mapping[str, StoredArray]) -> Mapping[str, StoredArray]:
    extra = [name for name in stored if name.startswith(_TRAINING_ONLY)]
    if extra:
        log.info("dropped %d arrays that only training needs, such as %s", len(extra), extra[0][:100])
    return {name: array for name, array in stored.items() if name not in extra}
