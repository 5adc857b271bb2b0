"""Start from the parameters of another run: their meaning is compared, not only their shapes."""

import dataclasses
import fnmatch
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dig_jax.checkpoints.reader import model_path, read_model
from dig_jax.components import Components, Params, model_options, network_params
from dig_jax.config import to_dict
from dig_jax.data.class_names import are_names, match_classes
from dig_jax.errors import naming_setting
from dig_jax.training.block_names import restacked

log = logging.getLogger(__name__)

# Options that change how a network is computed or trained, but not its function.
_IMPLEMENTATION = ("dtype", "remat", "mlp_parts", "implementation", "in_channels", "drop_path")
# Fields of the diffusion process that give inputs and outputs a meaning; the others only weight the loss.
_PROCESS_FIELDS = {
    "ddpm": ("schedule", "num_steps"),
    "flow": ("path", "prediction", "noise_scale"),
    "meanflow": ("path", "prediction", "noise_scale", "time_range"),
}
_LABELS = "label_embed.table.embedding"
_FAMILY = "model family"


@dataclasses.dataclass(frozen=True)
class WarmStart:
    """Parameters of another run, in the shapes and shardings of this one.

    arrays: by dotted name; parameters that are missing start at random.
    known_rows: which rows of the label tables are known; the others start at random.
    """

    arrays: dict[str, Array]
    known_rows: tuple[bool, ...]


def complete(fresh: Params, arrays: Mapping[str, Array], known_rows: Sequence[bool]) -> Params:
    """Replace random parameters by those of a `WarmStart`."""

    def replaced(path: tuple, leaf: Array) -> Array:
        name = _name(path)
        if name.endswith(_LABELS) and name in arrays:
            return jnp.where(jnp.array(known_rows)[:, None], arrays[name], leaf)
        return arrays.get(name, leaf)

    return jax.tree.map_with_path(replaced, fresh)


def read_warm_start(path: str, components: Components, expected: Params) -> WarmStart:
    """Read the parameters of another run.

    Args:
        path: its workdir, a checkpoint in it, an exported file, or hf://OWNER/NAME.
        components: of the new run.
        expected: shapes and shardings of its parameters.

    Raises:
        ConfigError: the source is unreadable or, without `init_partial`, its parameters have other shapes or
            another meaning.
    """
    with naming_setting("config.init_from"):
        source, step, params = read_model(model_path(path))
    with naming_setting(f"config.init_from={path}"):
        _compare_settings(source, components)
        # The heads of auxiliary losses start at random: the source's may have been trained on others.
        wanted = _by_name(network_params(expected))
        found = restacked(_by_name(params), wanted)
        known_rows = ()
        tables = [name for name in wanted if name.endswith(_LABELS) and name in found]
        if tables:
            rows = _table_rows(len(found[tables[0]]), source, components)
            known_rows = [row is not None for row in rows]
            # Unknown rows are replaced later.
            found |= {name: np.asarray(found[name])[[row or 0 for row in rows]] for name in tables}
        found, kept = _without_skipped(found, wanted, _patterns(components.config.init_skip))
        _compare_shapes(found, kept, components.config.init_partial)
    log.info("initialized the parameters from %s, step %d", path, step)
    fitting = [name for name in wanted if name in found and found[name].shape == wanted[name].shape]
    arrays = {name: _sharded(np.asarray(found[name]), wanted[name].sharding) for name in fitting}
    return WarmStart(arrays, tuple(known_rows))


def _compare_settings(source: Components, new: Components) -> None:
    """Compare the settings that give parameters their meaning."""
    before, after = _meaning(source), _meaning(new)
    if before[_FAMILY] != after[_FAMILY]:  # the options of the families do not compare
        before, after = ({_FAMILY: meaning[_FAMILY]} for meaning in (before, after))
    changed = [
        f"{name}: {_shown(before.get(name))} → {_shown(after.get(name))}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    if changed and not new.config.init_partial:
        raise ValueError(
            f"different settings, which give the parameters another meaning: {'; '.join(changed)}. Restore"
            " those settings, or start from what fits with --config.init_partial=True"
        )
    if changed:
        log.warning("config.init_partial: parameters change their meaning: %s", "; ".join(changed))
    sizes = [spec.image_shape[:2] for spec in (source.stored_spec, new.image_spec) if spec]
    if len(set(sizes)) > 1:
        log.info("initialized from images of %d × %d for images of %d × %d", *sizes[0], *sizes[1])


def _meaning(components: Components) -> dict[str, Any]:
    """Return the settings that change the function of the network, or what its inputs and outputs mean."""
    family, options = model_options(components.config.model)
    fields = {name: value for name, value in vars(options).items() if name not in _IMPLEMENTATION}
    fields["mlp_hidden_size"] = options.mlp_width
    if "skip" in fields:
        # "identity" differs only in how it is initialized.
        fields["skip"] = "linear" if fields["skip"] else None
        fields["skip_alignment"] = fields["skip"] and fields["skip_alignment"]
    diffusion = to_dict(components.config.diffusion)
    meaningful = _PROCESS_FIELDS[diffusion["process"]]
    return {
        _FAMILY: family,
        **{f"model.{name}": value for name, value in fields.items()},
        **{f"diffusion.{name}": diffusion[name] for name in ("process", *meaningful)},
    }


def _patterns(text: str) -> list[str]:
    return [pattern.strip() for pattern in text.split(",") if pattern.strip()]


def _without_skipped(
    found: dict[str, Any], wanted: Mapping[str, Any], patterns: Sequence[str]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return both without the parameters that start at random by `config.init_skip`."""

    def is_skipped(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    for pattern in patterns:
        if not fnmatch.filter(wanted, pattern):
            raise ValueError(
                f"config.init_skip: {pattern!r} matches no parameter of this model; expected a pattern of"
                f" names such as {next(iter(wanted))}"
            )
    skipped = [name for name in wanted if is_skipped(name)]
    if skipped:
        log.info(
            "config.init_skip: %d of %d parameters start at random: %s",
            len(skipped),
            len(wanted),
            ", ".join(skipped),
        )
    found, kept = ({name: x for name, x in xs.items() if not is_skipped(name)} for xs in (found, wanted))
    return found, kept


def _compare_shapes(found: Mapping[str, Array], wanted: Mapping[str, Any], partial: bool) -> None:
    afresh = [name for name in wanted if name not in found or found[name].shape != wanted[name].shape]
    unused = [name for name in found if name not in wanted]
    described = [
        f"{name}: got {found[name].shape if name in found else None}; expected"
        f" {wanted[name].shape if name in wanted else None}"
        for name in (*afresh, *unused)
    ]
    if described and not partial:
        raise ValueError(
            f"{len(described)} parameters do not match this model; the first is {described[0]}. To start from"
            " those that match, use --config.init_partial=True"
        )
    blocks = [name for name in wanted if "blocks" in name.split(".")]
    if set(blocks) <= set(afresh):
        raise ValueError(
            "no parameter of the blocks matches this model, so that nothing would be left of the source; the"
            f" first is {described[0]}"
        )
    if described:
        log.info(
            "config.init_partial: %d of %d parameters start at random, %d of the source are not used: %s",
            len(afresh),
            len(wanted),
            len(unused),
            "; ".join(described),
        )


def _table_rows(count: int, source: Components, new: Components) -> list[int | None]:
    """Return the old row of each row of a label table of `count` rows; the null class is the last row."""
    return [*_known_classes(source, new, count - 1), count - 1]


def _known_classes(source: Components, new: Components, count: int) -> Sequence[int | None]:
    """Return the old index of each class of the new run, by name where both runs have names."""
    names = new.image_spec.class_names
    old_names = source.stored_spec.class_names if source.stored_spec else ()
    if names == old_names:
        return range(count)
    if len(names) == count and not (are_names(names) and are_names(old_names)):
        log.warning(
            "the names of the %d classes are unknown in one of the runs: they keep their order", count
        )
        return range(count)
    rows = (
        match_classes(names, old_names) if are_names(names) == are_names(old_names) else [None] * len(names)
    )
    log.info(
        "%d of %d classes are known by name, the others start afresh",
        sum(row is not None for row in rows),
        len(rows),
    )
    return rows


def _sharded(array: np.ndarray, sharding: jax.sharding.Sharding) -> Array:
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _by_name(tree: Params) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
