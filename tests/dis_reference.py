"""DiS in NumPy and float64, from the released code's parameters by name, and the golden file's generator.

It computes what the released code's fused kernels compute, token by token like its `selective_scan_ref`, in
each direction and without stochastic depth.

    python tests/dis_reference.py      writes tests/golden/dis.npz
"""

import pathlib
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden" / "dis.npz"
WIDTH, DEPTH, CLASSES, SIZE, PATCH, CHANNELS, STATES = 24, 4, 3, 8, 2, 4, 16


def shapes(classes: int = CLASSES) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the released code's parameters for the golden model."""
    width, inner, rank = WIDTH, 2 * WIDTH, -(-WIDTH // 16)
    out = PATCH**2 * CHANNELS * 2
    found = {
        "pos_embed": (1, (SIZE // PATCH) ** 2 + (2 if classes else 1), width),
        "patch_embed.proj.weight": (width, CHANNELS, PATCH, PATCH),
        "patch_embed.proj.bias": (width,),
        "time_embed.0.weight": (4 * width, width),
        "time_embed.0.bias": (4 * width,),
        "time_embed.2.weight": (width, 4 * width),
        "time_embed.2.bias": (width,),
        "norm_f.weight": (width,),
        "final_layer.linear.weight": (out, width),
        "final_layer.linear.bias": (out,),
    }
    if classes:
        found["label_emb.embedding_table.weight"] = (classes + 1, width)
        found["final_layer.adaLN_modulation.1.weight"] = (2 * width, width)
        found["final_layer.adaLN_modulation.1.bias"] = (2 * width,)
    half = range(DEPTH // 2)
    for block in [*(f"in_blocks.{i}" for i in half), "mid_block", *(f"out_blocks.{i}" for i in half)]:
        found |= {
            f"{block}.norm.weight": (width,),
            f"{block}.mixer.in_proj.weight": (2 * inner, width),
            f"{block}.mixer.out_proj.weight": (width, inner),
        }
        for suffix in ("", "_b"):
            found |= {
                f"{block}.mixer.A{suffix}_log": (inner, STATES),
                f"{block}.mixer.D{suffix}": (inner,),
                f"{block}.mixer.conv1d{suffix}.weight": (inner, 1, 4),
                f"{block}.mixer.conv1d{suffix}.bias": (inner,),
                f"{block}.mixer.x_proj{suffix}.weight": (rank + 2 * STATES, inner),
                f"{block}.mixer.dt_proj{suffix}.weight": (inner, rank),
                f"{block}.mixer.dt_proj{suffix}.bias": (inner,),
            }
        if block.startswith("out"):
            found |= {
                f"{block}.skip_linear.weight": (width, 2 * width),
                f"{block}.skip_linear.bias": (width,),
            }
    return found


def state_dict(classes: int = CLASSES) -> dict[str, np.ndarray]:
    """Return parameters in float32 that depend on their names only."""
    params = {}
    for name, shape in shapes(classes).items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        x = rng.standard_normal(shape)
        if name.endswith("log"):
            x = np.log(np.arange(1, STATES + 1)) + 0.1 * x
        elif name.endswith(("norm.weight", "norm_f.weight", "D", "D_b")):
            x = 1 + 0.1 * x
        elif "dt_proj" in name and name.endswith("bias"):
            x = x - 3
        elif len(shape) > 1:
            x = x / np.sqrt(np.prod(shape[1:]))
        else:
            x = 0.1 * x
        params[name] = x.astype(np.float32)
    return params


def silu(x: np.ndarray) -> np.ndarray:
    """Return x times its logistic function."""
    return x / (1 + np.exp(-x))


def _scan(x, dt, A, B, C, D, z):  # noqa: PLR0913
    """Run the recurrence token by token; arrays have the layouts [B, D, L] and [B, N, L]."""
    state, outputs = np.zeros((*x.shape[:2], A.shape[1])), []
    for i in range(x.shape[2]):
        decay = np.exp(np.einsum("bd,dn->bdn", dt[:, :, i], A))
        state = decay * state + np.einsum("bd,bn,bd->bdn", dt[:, :, i], B[:, :, i], x[:, :, i])
        outputs.append(np.einsum("bdn,bn->bd", state, C[:, :, i]))
    return (np.stack(outputs, axis=2) + x * D[:, None]) * silu(z)


def _direction(p, block, suffix, x, z):
    """Run one direction of a mixer on x and z [B, D, L]."""

    def get(name):
        return p[f"{block}.mixer.{name}"]

    length, weight = x.shape[2], get(f"conv1d{suffix}.weight")
    padded = np.pad(x, ((0, 0), (0, 0), (3, 0)))
    x = sum(padded[:, :, k : k + length] * weight[:, 0, k, None] for k in range(4))
    x = silu(x + get(f"conv1d{suffix}.bias")[:, None])
    projected = np.einsum("ed,bdl->bel", get(f"x_proj{suffix}.weight"), x)
    rank = projected.shape[1] - 2 * STATES
    dt, B, C = np.split(projected, [rank, rank + STATES], axis=1)
    dt = np.einsum("dr,brl->bdl", get(f"dt_proj{suffix}.weight"), dt)
    dt = np.logaddexp(0, dt + get(f"dt_proj{suffix}.bias")[:, None])
    return _scan(x, dt, -np.exp(get(f"A{suffix}_log")), B, C, get(f"D{suffix}"), z)


def _mixer(p, block, h):
    xz = np.einsum("ed,bld->bel", p[f"{block}.mixer.in_proj.weight"], h)
    x, z = np.split(xz, 2, axis=1)
    flipped = _direction(p, block, "_b", x[:, :, ::-1], z[:, :, ::-1])
    y = _direction(p, block, "", x, z) + flipped[:, :, ::-1]
    return np.einsum("ed,bdl->ble", p[f"{block}.mixer.out_proj.weight"], y)


def _rms_norm(x, weight):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * weight


def _linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def forward(params, x, t, y=None) -> np.ndarray:
    """Return the output for images [B, C, H, W]; y=None is for unconditional models."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    kernel = p["patch_embed.proj.weight"]
    grid = x.shape[2] // PATCH
    patches = x.reshape(len(x), CHANNELS, grid, PATCH, grid, PATCH)
    tokens = np.einsum("bciujv,dcuv->bijd", patches, kernel).reshape(len(x), grid * grid, -1)
    tokens = tokens + p["patch_embed.proj.bias"]
    width = tokens.shape[-1]
    angles = t[:, None] * 10000.0 ** (-np.arange(width // 2) / (width // 2))
    time = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    time = _linear(p, "time_embed.2", silu(_linear(p, "time_embed.0", time)))[:, None]
    sequence, c = [time, tokens], time
    if y is not None:
        label = p["label_emb.embedding_table.weight"][y][:, None]
        sequence, c = [label, *sequence], time + label
    h = np.concatenate(sequence, axis=1) + p["pos_embed"]

    residual, skips, half = 0.0, [], DEPTH // 2
    for block in [
        *(f"in_blocks.{i}" for i in range(half)),
        "mid_block",
        *(f"out_blocks.{i}" for i in range(half)),
    ]:
        if block.startswith("out"):
            h = _linear(p, f"{block}.skip_linear", np.concatenate([h, skips.pop()], axis=-1))
        residual = residual + h
        h = _mixer(p, block, _rms_norm(residual, p[f"{block}.norm.weight"]))
        if block.startswith("in"):
            skips.append(h)
    h = _rms_norm(residual + h, p["norm_f.weight"])
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    if y is not None:
        shift, scale = np.split(_linear(p, "final_layer.adaLN_modulation.1", silu(c)), 2, axis=-1)
        h = h * (1 + scale) + shift
    h = _linear(p, "final_layer.linear", h)[:, len(sequence) - 1 :]
    h = h.reshape(len(x), grid, grid, PATCH, PATCH, 2 * CHANNELS)
    return np.einsum("bijuvc->bciujv", h).reshape(len(x), 2 * CHANNELS, grid * PATCH, grid * PATCH)


def inputs() -> dict[str, np.ndarray]:
    """Return the golden file's images, timesteps and labels."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, CHANNELS, SIZE, SIZE)).astype(np.float32)
    return {"x": x, "t": np.array([3.0, 941.0], np.float32), "y": np.array([1, CLASSES])}


def main() -> None:
    """Write the golden file."""
    given = inputs()
    unconditional = forward(state_dict(classes=0), given["x"], given["t"])
    np.savez_compressed(GOLDEN, **given, out=forward(state_dict(), **given), unconditional=unconditional)


if __name__ == "__main__":
    main()
