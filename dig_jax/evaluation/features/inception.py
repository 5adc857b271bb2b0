"""FID's Inception network: Inception v3 as in TensorFlow's graph of 2015-12-05, with 1,008 classes.

The Inception Score (Salimans et al. 2016), FID (Heusel et al. 2017) and sFID (Nash et al. 2021) use it. It
differs from the Inception v3 of other libraries: average pools do not count the padding, one branch of
Mixed_7c takes the maximum in place of the average, and images are resized without anti-aliasing. Layers are
named as in the files of torch-fidelity and pytorch-fid.
"""

import functools
import os
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dig_jax.evaluation.features.images import check_images, resize_tf1
from dig_jax.evaluation.features.network import Images
from dig_jax.evaluation.features.weights import Published, Recipe, find_file, load_weights

SIZE = 299
CLASSES = 1008
_EPSILON = 1e-3  # of the batch norms
# ADM's sFID uses the first channels of the 17 × 17 outputs of this many.
_SPATIAL_CHANNELS = 7
# A TPU would round float32 operands to bfloat16, a GPU to TF32. That changes scores.
_PRECISION = jax.lax.Precision.HIGHEST

# The files of torch-fidelity, pytorch-fid and the JAX ports.
_PUBLISHED = Published(
    network="inception",
    files=(
        "pt_inception-2015-12-05-6726825d.pth",
        "weights-inception-2015-12-05-6726825d.pth",
        "inception_v3_weights_fid.pickle",
    ),
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    megabytes=96,
)
# Counters of training steps, and a classifier that is used only in training.
_IGNORED = re.compile(r".*\.num_batches_tracked|AuxLogits\..*")
# Names of a layer's arrays in PyTorch's files and in those of JAX ports.
_TORCH_NAMES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}
_JAX_NAMES = {name: f"bn.{name}" for name in _TORCH_NAMES} | {"kernel": "conv.kernel"}

_Input = Float[Array, "n height width c"]
_Output = Float[Array, "n height_out width_out c_out"]


class Conv(nnx.Module):
    """Convolution without bias, batch norm with stored moments, and ReLU.

    Args:
        size_in: input channels.
        size_out: output channels.
        size: height and width of the kernel.
        stride: 1 pads with zeros to keep the size of the image; 2 does not pad.
        padded: False does not pad at stride 1 either.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        size: tuple[int, int] = (1, 1),
        *,
        stride: int = 1,
        padded: bool = True,
    ):
        self.kernel = nnx.Param(jnp.zeros((*size, size_in, size_out)))
        self.scale, self.bias = nnx.Param(jnp.ones(size_out)), nnx.Param(jnp.zeros(size_out))
        self.mean, self.var = nnx.Param(jnp.zeros(size_out)), nnx.Param(jnp.ones(size_out))
        self.stride, self.padding = stride, "SAME" if stride == 1 and padded else "VALID"

    def __call__(self, x: _Input) -> _Output:
        """Convolve, normalize and rectify."""
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            window_strides=(self.stride, self.stride),
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + _EPSILON)
        return jax.nn.relu((y - self.mean[...]) * factor + self.bias[...])


def max_pool(x: _Input, stride: int = 2) -> _Output:
    """Return the maximum over 3 × 3 windows; stride 1 keeps the size of the image."""
    padding = "SAME" if stride == 1 else "VALID"
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


# One object, so that networks have equal structures and share compiled programs.
_max_pool_same = functools.partial(max_pool, stride=1)


def average_pool(x: _Input) -> _Output:
    """Return the mean over the pixels of 3 × 3 windows that are in the image."""
    count = np.ones((1, *x.shape[1:3], 1), np.float32)
    total, count = (
        jax.lax.reduce_window(a, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") for a in (x, count)
    )
    return total / count


def _chain(x: _Input, *layers: Conv) -> _Output:
    return functools.reduce(lambda y, layer: layer(y), layers, x)


class Classifier(nnx.Module):
    """Kernel and bias of a linear map."""

    def __init__(self, size_in: int, classes: int):
        self.kernel = nnx.Param(jnp.zeros((size_in, classes)))
        self.bias = nnx.Param(jnp.zeros(classes))


class BlockA(nnx.Module):
    """Mixed_5b, 5c and 5d, at 35 × 35: branches of 1 × 1, 5 × 5 and twice 3 × 3, and an average pool."""

    def __init__(self, size_in: int, pool_features: int):
        self.branch1x1 = Conv(size_in, 64)
        self.branch5x5_1, self.branch5x5_2 = Conv(size_in, 48), Conv(48, 64, (5, 5))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(size_in, 64), Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = Conv(96, 96, (3, 3))
        self.branch_pool = Conv(size_in, pool_features)

    def __call__(self, x: _Input) -> _Output:
        """Return the branches' outputs side by side."""
        branches = [
            self.branch1x1(x),
            _chain(x, self.branch5x5_1, self.branch5x5_2),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            self.branch_pool(average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nnx.Module):
    """Mixed_6a: from 35 × 35 to 17 × 17."""

    def __init__(self):
        self.branch3x3 = Conv(288, 384, (3, 3), stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(288, 64), Conv(64, 96, (3, 3))
        self.branch3x3dbl_3 = Conv(96, 96, (3, 3), stride=2)

    def __call__(self, x: _Input) -> _Output:
        """Return the branches' outputs side by side."""
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return jnp.concatenate([self.branch3x3(x), double, max_pool(x)], axis=-1)


class BlockC(nnx.Module):
    """Mixed_6b to 6e, at 17 × 17: 7 × 7 convolutions as products of 1 × 7 and 7 × 1, of c channels."""

    def __init__(self, c: int):
        self.branch1x1 = Conv(768, 192)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, c), Conv(c, c, (1, 7))
        self.branch7x7_3 = Conv(c, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, c), Conv(c, c, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(c, c, (1, 7)), Conv(c, c, (7, 1))
        self.branch7x7dbl_5 = Conv(c, 192, (1, 7))
        self.branch_pool = Conv(768, 192)

    def __call__(self, x: _Input) -> _Output:
        """Return the branches' outputs side by side; those of `branch1x1` come first."""
        double = [self.branch7x7dbl_1, self.branch7x7dbl_2, self.branch7x7dbl_3, self.branch7x7dbl_4]
        branches = [
            self.branch1x1(x),
            _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3),
            _chain(x, *double, self.branch7x7dbl_5),
            self.branch_pool(average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(nnx.Module):
    """Mixed_7a: from 17 × 17 to 8 × 8."""

    def __init__(self):
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192), Conv(192, 320, (3, 3), stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, (3, 3), stride=2)

    def __call__(self, x: _Input) -> _Output:
        """Return the branches' outputs side by side."""
        branches = [
            _chain(x, self.branch3x3_1, self.branch3x3_2),
            _chain(x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4),
            max_pool(x),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nnx.Module):
    """Mixed_7b and 7c, at 8 × 8: the 3 × 3 convolutions end in 1 × 3 beside 3 × 1.

    Args:
        size_in: input channels.
        pool: the average in Mixed_7b, the maximum in Mixed_7c.
    """

    def __init__(self, size_in: int, pool: Callable[[_Input], _Output]):
        self.branch1x1 = Conv(size_in, 320)
        self.branch3x3_1 = Conv(size_in, 384)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(size_in, 448), Conv(448, 384, (3, 3))
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, (1, 3)), Conv(384, 384, (3, 1))
        self.branch_pool = Conv(size_in, 192)
        self.pool = pool

    def __call__(self, x: _Input) -> _Output:
        """Return the branches' outputs side by side."""
        single, double = self.branch3x3_1(x), _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(nnx.Module):
    """A `FeatureNetwork` of 23,850,960 parameters.

    Its features:
        pool: the mean over 8 × 8 pixels before the classifier, for FID, KID, precision and recall.
        spatial: the first 7 channels of Mixed_6d's first branch, [17, 17, 7] flattened, for sFID.
        logits: the classifier's outputs without its bias, for the Inception Score as ADM computes it.
        logits_with_bias: with its bias, as torch-fidelity computes it.

    The weights are zeros; `load_features` reads trained ones.
    """

    name = "inception"
    preprocessing = "TensorFlow 1's bilinear resize to 299, (x - 128) / 128"

    def __init__(self):
        self.weights_hash = ""
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), padded=False)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c, self.Mixed_5d = BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB()
        self.Mixed_6b, self.Mixed_6c = BlockC(128), BlockC(160)
        self.Mixed_6d, self.Mixed_6e = BlockC(160), BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b = BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, _max_pool_same)
        self.fc = Classifier(2048, CLASSES)

    @property
    def dimensions(self) -> dict[str, int]:
        """Length of each kind of feature vector by name."""
        spatial = 17 * 17 * _SPATIAL_CHANNELS
        return {"pool": 2048, "spatial": spatial, "logits": CLASSES, "logits_with_bias": CLASSES}

    def __call__(self, images: Images) -> dict[str, Float[Array, "n d"]]:
        """Return the features of images; see `FeatureNetwork`."""
        check_images(images)
        x = (resize_tf1(images.astype(jnp.float32), SIZE) - 128) / 128
        x = max_pool(_chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3))
        x = max_pool(_chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[..., :_SPATIAL_CHANNELS].reshape(len(x), -1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean((1, 2))
        logits = jnp.dot(pool, self.fc.kernel[...], precision=_PRECISION)
        return {
            "pool": pool,
            "spatial": spatial,
            "logits": logits,
            "logits_with_bias": logits + self.fc.bias[...],
        }


def inception_features(
    images: Images | np.ndarray, weights: str | os.PathLike
) -> dict[str, Float[Array, "n ..."]]:
    """Return the Inception features of a batch of images.

    Args:
        images: RGB pixels, uint8 or float in 0…255, of any height and width.
        weights: as `source` of `load_features`.

    Returns:
        "pool" [n, 2048], "spatial" [n, 17, 17, 7], "logits" [n, 1008] and "logits_unbiased" [n, 1008], the
        logits without the bias.

    Raises:
        ConfigError: there are no weights.
        CheckpointError: the file is unreadable or damaged, or holds the weights of another network.
        ValueError: images of another shape or dtype.
    """
    features = _extract(_load_once(os.fspath(weights)), jnp.asarray(images))
    return {
        "pool": features["pool"],
        "spatial": features["spatial"].reshape(len(images), 17, 17, -1),
        "logits": features["logits_with_bias"],
        "logits_unbiased": features["logits"],
    }


@jax.jit
def _extract(network: Inception, images: Images) -> dict[str, Float[Array, "n d"]]:
    return network(images)


@functools.lru_cache(maxsize=1)
def _load_once(source: str) -> Inception:
    return load_inception(source)


def load_inception(source: str) -> Inception:
    """Load FID's Inception network from a file of torch-fidelity, pytorch-fid or a JAX port.

    Raises:
        ConfigError: there are no weights.
        CheckpointError: the file is unreadable or damaged, or holds the weights of another network.
    """
    path = find_file(source, _PUBLISHED)
    network = nnx.eval_shape(Inception)
    parameters = [path for path, _ in nnx.to_flat_state(nnx.state(network))]
    layouts = [{path: recipe(path) for path in parameters} for recipe in (_torch_recipe, _jax_recipe)]
    return load_weights(network, path, layouts, _IGNORED)


def _torch_recipe(path: tuple) -> Recipe:
    *modules, leaf = path
    if modules == ["fc"]:
        name = "fc.weight" if leaf == "kernel" else "fc.bias"
    else:
        name = ".".join([*modules, _TORCH_NAMES[leaf]])
    return Recipe(
        (name,), lambda arrays: arrays[0].transpose(2, 3, 1, 0) if arrays[0].ndim == 4 else arrays[0].T
    )


def _jax_recipe(path: tuple) -> Recipe:
    *modules, leaf = path
    name = ".".join([*modules, leaf if modules == ["fc"] else _JAX_NAMES[leaf]])
    return Recipe((name,), lambda arrays: arrays[0])
