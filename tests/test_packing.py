"""Several images in one sequence: each gets what it gets alone, and sees nothing of the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax_options import unoptimized

from dig_jax import create_model
from dig_jax.models.dig import DIRECTIONS
from dig_jax.models.packing import PackedGrids
from dig_jax.parallel import make_mesh
from dig_jax.testing import tiny_settings

SHAPES = ((4, 6), (8, 8), (6, 2))
SMALL = {"hidden_size": 32, "num_heads": 2, "in_channels": 1, "learn_sigma": False, "mlp_hidden_size": 32}
VARIANTS = {
    "four directions": {"name": "DiG-S/2", "depth": 4},
    "spread, long skips, one mixer each": {
        "name": "DiG-S/2",
        "depth": 4,
        "mixer": "gla*2+softmax+local",
        "gate_normalizer": "spread",
        "key_expansion": 1.0,
        "positions": "interpolated",
        "rope": True,
        "window": 1,
        "conv": "inside",
        "skip": "linear",
    },
    "DiT": {"name": "DiT-S/2", "depth": 1, "rope": True, "time_input": "data", "mlp_parts": 3},
}


@pytest.fixture(scope="module", autouse=True)
def cheap_programs():
    with unoptimized():
        yield


@functools.cache
def model_of(variant):
    """A model whose parameters are all random, as a function of them."""
    options = {**SMALL, **VARIANTS[variant]}
    model = create_model(options.pop("name"), input_size=8, num_classes=3, rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(model)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.float32(0.2 * random.standard_normal(x.shape)), params)
    alone = jax.jit(lambda x, t, y: nnx.merge(graphdef, params)(x, t, y))
    packed = jax.jit(lambda images, t, y: nnx.merge(graphdef, params).packed(images, t, y))
    return alone, packed


@functools.cache
def inputs():
    random = np.random.default_rng(1)
    images = [jnp.float32(random.standard_normal((2, *shape, 1))) for shape in SHAPES]
    return images, jnp.float32([[3, 500, 999], [250, 40, 700]]), jnp.int32([[0, 1, 2], [3, 0, 1]])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_packed_image_gets_what_it_gets_alone(variant):
    alone, packed = model_of(variant)
    images, t, y = inputs()
    for index, (image, output) in enumerate(zip(images, packed(images, t, y), strict=True)):
        expected = alone(image, t[:, index], y[:, index])
        scale = np.abs(expected).max()
        assert scale > 0.1
        np.testing.assert_allclose(output / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("what", ["pixels", "time", "label"])
def test_nothing_of_an_image_leaks_into_its_neighbors(what):
    _, packed = model_of("four directions")
    images, t, y = inputs()
    before = packed(images, t, y)
    if what == "pixels":
        images = [images[0], -images[1], images[2]]
    elif what == "time":
        t = t.at[:, 1].add(77)
    else:
        y = y.at[:, 1].set(2)
    after = packed(images, t, y)
    changes = [
        float(jnp.abs(x - old).max() / jnp.abs(old).max()) for x, old in zip(after, before, strict=True)
    ]
    # Sums of decays round differently beside other decays.
    assert max(changes[0], changes[2]) < 1e-5
    assert changes[1] > 1e-2


@pytest.mark.slow
def test_gradients_are_those_of_the_images_alone():
    options = {**SMALL, **VARIANTS["four directions"]}
    model = create_model(options.pop("name"), input_size=8, num_classes=3, rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(model)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.float32(0.2 * random.standard_normal(x.shape)), params)
    images, t, y = inputs()
    images, t, y = images[:2], t[:, :2], y[:, :2]

    def packed_loss(params):
        return sum(jnp.sum(x**2) for x in nnx.merge(graphdef, params).packed(images, t, y))

    def loss(params, x, t, y):
        return jnp.sum(nnx.merge(graphdef, params)(x, t, y) ** 2)

    packed = jax.jit(jax.grad(packed_loss))(params)
    alone = [jax.jit(jax.grad(loss))(params, x, t[:, i], y[:, i]) for i, x in enumerate(images)]
    expected = jax.tree.map(jnp.add, *alone)
    error = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max()), packed, expected)
    assert max(jax.tree.leaves(error)) < 1e-4


def test_the_order_by_columns_visits_each_image_in_turn():
    grids = PackedGrids(((2, 3), (3, 1), (1, 2)))
    assert grids.by_columns.tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8, 9, 10]
    np.testing.assert_array_equal(grids.segment_ids[grids.by_columns], grids.segment_ids)
    assert len(DIRECTIONS) == VARIANTS["four directions"]["depth"]


def test_packing_that_does_not_work_is_refused():
    def model(name, **options):
        fields = {"in_channels": 1, "learn_sigma": False, **options}
        return nnx.eval_shape(
            lambda: create_model(name, input_size=16, num_classes=3, rngs=nnx.Rngs(0), **fields)
        )

    images, t, y = inputs()
    for unsupported in (
        model("U-DiG-S"),
        model("DiS-S/2", depth=2),
        model("DiT-S/2", depth=1, class_tokens=2),
        model("DiG-S/2", skip="linear", skip_alignment="upstream"),
    ):
        with pytest.raises(ValueError, match="unsupported packed images of this model; expected DiG"):
            unsupported.packed(images, t, y)
    dig = model("DiG-S/2")
    with pytest.raises(ValueError, match=r"got t of shape \(2, 2\) for 3 images per sequence; expected"):
        dig.packed(images, t[:, :2])
    with pytest.raises(ValueError, match="invalid input width 7; expected a multiple of patch_size=2"):
        dig.packed([jnp.zeros((2, 4, 7, 1))], t[:, :1])
    mesh = make_mesh(tiny_settings(mesh__data=2, mesh__context=2).mesh, batch_size=2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="with 2 devices along mesh axis context"):
        dig.packed(images, t, y)
