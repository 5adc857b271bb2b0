"""HBM traffic of an optimized HLO module, including tile padding and loop iterations."""

import re


def hbm_bytes(text: str) -> int:
    """Return the bytes that an optimized module reads and writes, including padding and loop iterations."""
    computations = {}
    for block in re.split(r"\n(?=ENTRY|%)", text):
        name = re.match(r"(?:ENTRY )?(%[\w.-]+)", block)
        if name:
            lines = (
                re.match(r"\s+(?:ROOT )?(%\S+) = (.*?) ([a-z][\w-]*)\((.*)", x) for x in block.splitlines()
            )
            computations[name.group(1)] = [line.groups() for line in lines if line]
    entry = re.search(r"\nENTRY (%[\w.-]+)", text).group(1)
    return _computation_bytes(computations, entry)


FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "copy-done", "after-all", "iota"}


def _computation_bytes(computations: dict[str, list[tuple[str, ...]]], name: str) -> int:
    sizes, total = {}, 0
    for result, shape, op, rest in computations[name]:
        sizes[result] = _shape_bytes(shape)
        called = re.search(r"(?:calls|body)=(%[\w.-]+)", rest)
        read = [sizes.get(x, 0) for x in re.findall(r"%[\w.-]+", rest.split("), ")[0])]
        if op == "while":
            condition = computations[re.search(r"condition=(%[\w.-]+)", rest).group(1)]
            trips = max(
                int(r.split(")")[0]) for _, s, o, r in condition if o == "constant" and s.startswith("s32")
            )
            total += trips * _computation_bytes(computations, called.group(1))
        elif op == "fusion":
            total += _fusion_bytes(computations[called.group(1)], read, sizes[result])
        elif op == "dynamic-update-slice":
            total += 2 * read[1]
        elif op == "dynamic-slice":
            total += 2 * sizes[result]
        elif op not in FREE:
            total += sizes[result] + sum(read)
    return total


def _fusion_bytes(body: list[tuple[str, ...]], read: list[int], written: int) -> int:
    """Return a fusion's bytes. Operands that are only sliced, and results only updated, count in part."""
    sizes = {result: _shape_bytes(shape) for result, shape, _, _ in body}
    total = written
    for result, _, op, rest in body:
        if op == "parameter":
            users = [
                (o, r, size) for n, _, o, r in body for size in [sizes[n]] if re.search(rf"{result}\b", r)
            ]
            whole = read[int(rest.split(")")[0])]
            if users and all(o == "dynamic-slice" for o, _, _ in users):
                whole = sum(size for *_, size in users)
            elif users and all(o == "dynamic-update-slice" and r.startswith(result) for o, r, _ in users):
                update = sum(sizes.get(re.findall(r"%[\w.-]+", r)[1], 0) for _, r, _ in users)
                whole, total = 0, total - written + update
            total += whole
    return total


def _shape_bytes(shape: str) -> int:
    return sum(map(_padded_bytes, re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", shape)))


def _padded_bytes(shape: str) -> int:
    dtype, dims, layout = re.match(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", shape).groups()
    if layout and "S(1)" in layout:
        return 0
    bits = int((re.search(r"\d+", dtype) or [8])[0])
    dims = [int(x) for x in dims.split(",") if x]
    if dims and layout and ":T(" in layout:
        order = [int(x) for x in layout.split(":")[0].split(",")]
        dims = [dims[axis] for axis in reversed(order)]
        tile = [int(x) for x in re.search(r"T\(([\d,]+)\)", layout).group(1).split(",")]
        for axis, size in zip(range(-len(tile), 0), tile, strict=True):
            if -axis <= len(dims):
                dims[axis] = -(-dims[axis] // size) * size
    count = 1
    for n in dims:
        count *= n
    return count * bits // 8
