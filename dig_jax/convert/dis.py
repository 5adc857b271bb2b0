"""Parameter names of the released PyTorch code of DiS (feizc/DiS at commit 3da562e)."""

from collections.abc import Mapping

# Ours → released. A name covers the weight (kernel) and the bias, if there is one.
TOP = {
    "patch_embed": "patch_embed.proj",
    "time_embed.hidden": "time_embed.0",
    "time_embed.out": "time_embed.2",
    "label_embed.table": "label_emb.embedding_table",
    "positions": "pos_embed",
    "final.rms": "norm_f",
    "final.modulation.linear": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}
BLOCK: Mapping[str, str] = {
    "norm": "norm",
    "skip": "skip_linear",
    "mixer.in_proj": "mixer.in_proj",
    "mixer.out_proj": "mixer.out_proj",
} | {
    f"mixer.{direction}.{ours}": f"mixer.{theirs}"
    for direction, suffix in (("forward", ""), ("backward", "_b"))
    for ours, theirs in (
        ("conv", f"conv1d{suffix}"),
        ("x_proj", f"x_proj{suffix}"),
        ("dt_proj", f"dt_proj{suffix}"),
        ("A_log", f"A{suffix}_log"),
        ("D", f"D{suffix}"),
    )
}


def blocks(path: tuple, depth: int) -> tuple[list[str], tuple]:
    """Return the released names of the blocks in one of our leaves, and the leaf's path in a block.

    Args:
        path: the leaf's path, which starts with "blocks".
        depth: number of blocks but the one in the middle.
    """
    part, inner = path[1], path[2:]
    layers = range(depth // 2)
    names = {
        "inward": [f"in_blocks.{layer}" for layer in layers],
        "middle": ["mid_block"],
        # Layer k joins the output of block k; the first block of the second half joins the last one.
        "outward": [f"out_blocks.{depth // 2 - 1 - layer}" for layer in layers],
    }
    return names[part], inner
