"""DINOv2 (Oquab et al. 2023): vision transformers whose features FD-DINOv2 compares (Stein et al. 2023)."""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dig_jax.errors import ConfigError, alternatives, suggest
from dig_jax.evaluation.features.images import check_images, resize_bicubic, resize_pillow
from dig_jax.evaluation.features.network import Images
from dig_jax.evaluation.features.weights import Published, Recipe, find_file, load_weights

_PREPROCESSING = {
    "edm2": "anti-aliased bicubic resize to 224 in float32, ImageNet mean and deviation (EDM2)",
    "dgm_eval": "Pillow's bicubic resize to 224 in uint8, ImageNet mean and deviation (dgm-eval)",
}
# Mean and standard deviation of ImageNet's colors in 0…1.
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)
_EPSILON = 1e-6
# A TPU would round float32 operands to bfloat16, a GPU to TF32. That changes scores.
_PRECISION = jax.lax.Precision.HIGHEST
# Masks of training, which features do not need.
_IGNORED = re.compile(r"(embeddings\.)?mask_token")

_Tokens = Float[Array, "n t width"]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes of a vision transformer.

    width: features of a token.
    depth: number of blocks.
    heads: attention heads.
    patch: height and width of a patch in pixels.
    size: height and width of the input in pixels.
    table: height and width of the stored table of positions, in patches.
    """

    width: int
    depth: int
    heads: int
    patch: int = 14
    size: int = 224
    table: int = 37


ARCHITECTURES = {
    "dinov2_vitl14": Architecture(width=1024, depth=24, heads=16),
    "dinov2_vitb14": Architecture(width=768, depth=12, heads=12),
}
_HUB = {"dinov2_vitl14": ("facebook/dinov2-large", 1218), "dinov2_vitb14": ("facebook/dinov2-base", 346)}


class Affine(nnx.Module):
    """Kernel and bias, or scale and bias, of all layers of one kind.

    Args:
        shape: shape of the kernel, with input features before output features.
        layers: () or the number of layers that are stacked along a leading axis.
    """

    def __init__(self, *shape: int, layers: tuple[int, ...] = ()):
        self.kernel, self.bias = (
            nnx.Param(jnp.zeros((*layers, *shape))),
            nnx.Param(jnp.zeros((*layers, shape[-1]))),
        )

    def dot(self, x: _Tokens) -> Float[Array, "n t width_out"]:
        """Return the linear map of the last axis."""
        return jnp.dot(x, self.kernel[...], precision=_PRECISION) + self.bias[...]

    def norm(self, x: _Tokens) -> _Tokens:
        """Return the layer norm over the last axis."""
        centered = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centered).mean(-1, keepdims=True)
        return centered * jax.lax.rsqrt(variance + _EPSILON) * self.kernel[...] + self.bias[...]


class Blocks(nnx.Module):
    """All blocks; each parameter has a leading axis of depth."""

    def __init__(self, architecture: Architecture):
        width, layers = architecture.width, (architecture.depth,)
        self.heads = architecture.heads
        self.norm1, self.norm2 = Affine(width, layers=layers), Affine(width, layers=layers)
        self.qkv, self.proj = Affine(width, 3 * width, layers=layers), Affine(width, width, layers=layers)
        self.fc1, self.fc2 = Affine(width, 4 * width, layers=layers), Affine(4 * width, width, layers=layers)
        self.scale1, self.scale2 = (nnx.Param(jnp.zeros((*layers, width))) for _ in range(2))

    def __call__(self, x: _Tokens) -> _Tokens:
        """Run the blocks one after another."""
        graphdef, layers = nnx.split(self)
        return jax.lax.scan(lambda x, layer: (nnx.merge(graphdef, layer).run_one(x), None), x, layers)[0]

    def run_one(self, x: _Tokens) -> _Tokens:
        """Run one block; the parameters have no leading axis."""
        x = x + self.scale1[...] * self.proj.dot(self.attention(self.qkv.dot(self.norm1.norm(x))))
        return x + self.scale2[...] * self.fc2.dot(
            jax.nn.gelu(self.fc1.dot(self.norm2.norm(x)), approximate=False)
        )

    def attention(self, qkv: Float[Array, "n t three_widths"]) -> _Tokens:
        """Return the attention of all heads."""
        n, t, _ = qkv.shape
        q, k, v = jnp.moveaxis(qkv.reshape(n, t, 3, self.heads, -1), 2, 0)
        scores = jnp.einsum("nqhc,nkhc->nhqk", q, k, precision=_PRECISION) * q.shape[-1] ** -0.5
        return jnp.einsum("nhqk,nkhc->nqhc", jax.nn.softmax(scores), v, precision=_PRECISION).reshape(
            n, t, -1
        )


class Dinov2(nnx.Module):
    """A `FeatureNetwork` with one kind of features, `cls`: the class token after the last norm.

    Args:
        name: its name.
        architecture: its sizes.
        preprocessing: "edm2" or "dgm_eval". The first is the code of EDM2 (Karras et al. 2024), the second
            that of dgm-eval (Stein et al. 2023). Their scores are almost the same, but not equal.
    """

    def __init__(self, name: str, architecture: Architecture, preprocessing: str = "edm2"):
        a, grid = architecture, architecture.size // architecture.patch
        self.name, self.weights_hash = name, ""
        self.preprocessing, self.resize = _PREPROCESSING[preprocessing], preprocessing
        self.architecture = architecture
        self.patches = Affine(a.patch, a.patch, 3, a.width)
        self.cls_token = nnx.Param(jnp.zeros(a.width))
        self.positions = nnx.Param(jnp.zeros((1 + grid * grid, a.width)))
        self.blocks = Blocks(a)
        self.norm = Affine(a.width)

    @property
    def dimensions(self) -> dict[str, int]:
        """Length of each kind of feature vector by name."""
        return {"cls": self.architecture.width}

    def __call__(self, images: Images) -> dict[str, Float[Array, "n d"]]:
        """Return the features of images; see `FeatureNetwork`."""
        return {"cls": self.encode(self._input(images))}

    def patch_features(self, images: Images) -> Float[Array, "n rows columns d"]:
        """Return the tokens of the patches of images after the last norm, as in REPA (Yu et al. 2025)."""
        grid = self.architecture.size // self.architecture.patch
        tokens = self._tokens(self._input(images))[:, 1:]
        return tokens.reshape(len(images), grid, grid, -1)

    def _input(self, images: Images) -> Float[Array, "n size size 3"]:
        check_images(images)
        resize = resize_bicubic if self.resize == "edm2" else resize_pillow
        pixels = resize(images.astype(jnp.float32), self.architecture.size)
        return (pixels / 255 - _MEAN) / _DEVIATION

    def encode(self, pixels: Float[Array, "n size size 3"]) -> Float[Array, "n width"]:
        """Return the class token of normalized images of the network's size."""
        return self._tokens(pixels)[:, 0]

    def _tokens(self, pixels: Float[Array, "n size size 3"]) -> _Tokens:
        """Return the class token and the patches' tokens, after the last norm."""
        patches = jax.lax.conv_general_dilated(
            pixels,
            self.patches.kernel[...],
            window_strides=(self.architecture.patch,) * 2,
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )
        n, _, _, width = patches.shape
        patches = patches.reshape(n, -1, width) + self.patches.bias[...]
        first = jnp.broadcast_to(self.cls_token[...], (n, 1, width))
        x = jnp.concatenate([first, patches], axis=1) + self.positions[...]
        return self.norm.norm(self.blocks(x))


def load_dinov2(name: str, source: str, preprocessing: str = "edm2") -> Dinov2:
    """Load DINOv2 from files of the Hugging Face Hub or of the released code.

    Args:
        name: "dinov2_vitl14" or "dinov2_vitb14".
        source: as in `load_features`.
        preprocessing: "edm2" or "dgm_eval".

    Raises:
        ConfigError: there are no weights, or the preprocessing is unknown.
        CheckpointError: the file is unreadable or damaged, or holds the weights of another network.
    """
    if preprocessing not in _PREPROCESSING:
        raise ConfigError(
            f"unknown preprocessing {preprocessing!r}{suggest(preprocessing, _PREPROCESSING)}; expected"
            f" {alternatives(list(_PREPROCESSING))}"
        )
    repository, megabytes = _HUB[name]
    published = Published(
        network=name,
        files=("model.safetensors", "pytorch_model.bin", f"{name}_pretrain.pth"),
        url=f"https://huggingface.co/{repository}/resolve/main/model.safetensors",
        megabytes=megabytes,
    )
    network = nnx.eval_shape(lambda: Dinov2(name, ARCHITECTURES[name], preprocessing))
    return load_weights(network, find_file(source, published), layouts(ARCHITECTURES[name]), _IGNORED)


def layouts(architecture: Architecture) -> list[Mapping[tuple, Recipe]]:
    """Return the recipes for the files of the Hub and of the released code."""
    return [_recipes(architecture, names) for names in (_HUB_NAMES, _ORIGINAL_NAMES)]


# Names of a block's parts; several names are the parts of one matrix.
_HUB_NAMES = {
    "block": "encoder.layer.{}.",
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "proj": ("attention.output.dense",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
    "scale1": ("layer_scale1.lambda1",),
    "scale2": ("layer_scale2.lambda1",),
    "patches": ("embeddings.patch_embeddings.projection",),
    "cls_token": ("embeddings.cls_token",),
    "positions": ("embeddings.position_embeddings",),
    "norm": ("layernorm",),
}
_ORIGINAL_NAMES = {
    "block": "blocks.{}.",
    "norm1": ("norm1",),
    "norm2": ("norm2",),
    "qkv": ("attn.qkv",),
    "proj": ("attn.proj",),
    "fc1": ("mlp.fc1",),
    "fc2": ("mlp.fc2",),
    "scale1": ("ls1.gamma",),
    "scale2": ("ls2.gamma",),
    "patches": ("patch_embed.proj",),
    "cls_token": ("cls_token",),
    "positions": ("pos_embed",),
    "norm": ("norm",),
}


def _recipes(a: Architecture, names: Mapping[str, str | tuple[str, ...]]) -> Mapping[tuple, Recipe]:
    """Return the recipe of each parameter by its path."""

    def recipe(path: tuple[str, ...], combine: Callable[[list[np.ndarray]], np.ndarray]) -> None:
        *modules, part = [name for name in path if name not in ("kernel", "bias")]
        prefixes = [str(names["block"]).format(i) for i in range(a.depth)] if modules else [""]
        suffix = {"kernel": ".weight", "bias": ".bias"}.get(path[-1], "")
        recipes[path] = Recipe(
            tuple(f"{prefix}{name}{suffix}" for prefix in prefixes for name in names[part]), combine
        )

    recipes: dict[tuple, Recipe] = {}
    for part, width in {"qkv": a.width, "proj": a.width, "fc1": a.width, "fc2": 4 * a.width}.items():
        recipe(
            ("blocks", part, "kernel"),
            lambda arrays, width=width: np.stack(arrays).reshape(a.depth, -1, width).transpose(0, 2, 1),
        )
        recipe(("blocks", part, "bias"), lambda arrays: np.stack(arrays).reshape(a.depth, -1))
    for part in ("norm1", "norm2"):
        recipe(("blocks", part, "kernel"), _stack)
        recipe(("blocks", part, "bias"), _stack)
    recipe(("blocks", "scale1"), _stack)
    recipe(("blocks", "scale2"), _stack)
    recipe(("patches", "kernel"), lambda arrays: arrays[0].transpose(2, 3, 1, 0))
    for path in (("patches", "bias"), ("norm", "kernel"), ("norm", "bias")):
        recipe(path, lambda arrays: arrays[0])
    recipe(("cls_token",), lambda arrays: arrays[0].reshape(a.width))
    recipe(("positions",), lambda arrays: _positions(arrays[0], a))
    return recipes


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    return np.stack(arrays)


def _positions(table: np.ndarray, a: Architecture) -> np.ndarray:
    """Return the positions of the class token and of the input's patches, given the stored table."""
    table = table.reshape(1 + a.table**2, a.width)
    patches = resize_table(table[1:].reshape(a.table, a.table, a.width), a.size // a.patch)
    return np.concatenate([table[:1], patches.reshape(-1, a.width)])


def resize_table(table: Float[np.ndarray, "m m c"], size: int) -> Float[np.ndarray, "size size c"]:
    """Resize a table of positions as the released code does, on which the published scores rest.

    It interpolates with PyTorch's cubic kernel (a = -0.75) without anti-aliasing, at a scale of
    (size + 0.1) / m in place of size / m. transformers has the same kernel and the exact scale.
    """
    m = len(table)
    if m == size:
        return table
    center = (np.arange(size) + 0.5) * m / (size + 0.1) - 0.5
    first = np.floor(center).astype(int)
    weights = np.zeros((size, m))
    for offset in (-1, 0, 1, 2):
        column = np.clip(first + offset, 0, m - 1)  # the border is repeated
        np.add.at(weights, (np.arange(size), column), _cubic(np.abs(center - first - offset)))
    return np.einsum("im,jn,mnc->ijc", weights, weights, table.astype(np.float64), optimize=True).astype(
        np.float32
    )


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Return Keys's kernel (1981) at distances below 2."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, far)
