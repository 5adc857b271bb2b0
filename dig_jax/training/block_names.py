"""The parameters of stacked blocks by the number of the block, whatever pattern the stack repeats."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

# Of `BlockStack`: block i is layer i // period of groups[i % period], or in rest.
_STACKED = re.compile(r"(?P<stack>.+?)\.(?P<part>groups|rest)\.(?P<position>\d+)\.(?P<name>.+)")


def names_by_block(arrays: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return for each parameter of blocks its names by block, in the order of its leading axis.

    Args:
        arrays: values with shapes, by dotted name. "blocks.groups.1.mlp.out.kernel" of a pattern of four
            blocks is "blocks.1.mlp.out.kernel", "blocks.5.mlp.out.kernel" and so on.
    """
    matches = {name: match for name in arrays if (match := _STACKED.fullmatch(name))}
    periods: dict[str, int] = {}
    layers: dict[str, int] = {}
    for name, match in matches.items():
        if match["part"] == "groups":
            stack = match["stack"]
            periods[stack] = max(periods.get(stack, 0), int(match["position"]) + 1)
            layers[stack] = arrays[name].shape[0]
    found = {}
    for name, match in matches.items():
        stack, position = match["stack"], int(match["position"])
        period, count = periods.get(stack, 0), layers.get(stack, 0)
        blocks = (
            range(position, period * count, period)
            if match["part"] == "groups"
            else [period * count + position]
        )
        found[name] = [f"{stack}.{block}.{match['name']}" for block in blocks]
    return found


def restacked(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with the names and in the stacks of other ones.

    Args:
        found: arrays by dotted name.
        wanted: values with shapes, by dotted name.

    Returns:
        Arrays by name. A stack is there if all of its blocks were found; blocks that are in no stack keep
        names such as "blocks.5.mlp.out.kernel".
    """
    theirs, ours = names_by_block(found), names_by_block(wanted)
    if theirs == ours:
        return dict(found)
    result = {name: x for name, x in found.items() if name not in theirs}
    blocks = {}
    for name, names in theirs.items():
        layers = np.asarray(found[name]) if ".groups." in name else [np.asarray(found[name])]
        blocks |= dict(zip(names, layers, strict=True))
    for name, names in ours.items():
        layers = [blocks[block] for block in names if block in blocks]
        if len(layers) == len(names) and len({layer.shape for layer in layers}) == 1:
            result[name] = np.stack(layers) if ".groups." in name else layers[0]
            for block in names:
                del blocks[block]
    return result | blocks
