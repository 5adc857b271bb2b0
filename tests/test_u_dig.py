"""U-DiG: levels of other widths and grids, with one path down, one path up and a skip per resolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax import ConfigError, create_model, load
from dig_jax.checkpoints.parameter_file import write_parameter_file
from dig_jax.components import Components
from dig_jax.data import ImageSpec
from dig_jax.models.backbone import coarser
from dig_jax.models.dig import DIRECTIONS
from dig_jax.models.isolation import isolate_tokens
from dig_jax.models.registry import resolve_options
from dig_jax.models.u_dig import shuffle, unshuffle
from dig_jax.parallel import distribute, make_mesh, state_sharding
from dig_jax.testing import mesh_of, random_params, tiny_components, tiny_settings
from dig_jax.training.objectives.auxiliary.objective import make_auxiliary
from dig_jax.training.state import abstract_state, init_params
from dig_jax.training.warm_start import complete, read_warm_start

# One block per level: rows, rows reversed, columns, columns reversed and rows again.
TINY = {
    "model__name": "U-DiG-S",
    "model__depth": 5,
    "model__hidden_size": 32,
    "model__num_heads": 1,
    "model__mlp_hidden_size": 48,
    "model__implementation": "reference",  # compiles fast
}
GRID, STRIDES = (6, 10), (1, 2, 4, 2, 1)  # 3 × 5 tokens in the second level, which are filled up


def u_dig(**changes):
    return tiny_components(**TINY | changes)


@pytest.fixture(scope="module")
def traced():
    """Parameters and a jitted (params, x, t, y, drop) → outputs of a U-DiG without convolutions."""
    components = u_dig(model__conv="none", model__internal_head=2)
    taps = tuple(range(5))

    @jax.jit
    def outputs(params, x, t, y, drop):
        return components.model_spec.outputs(params, x, t, y, drop, taps)

    return random_params(components), outputs


def changed(traced, params, token):
    """Where each block and the output change if one pixel of an image changes, on the grid of each."""
    _, outputs = traced
    x = jax.random.normal(jax.random.key(0), (1, *GRID, 1))
    pair = jnp.concatenate([x, x.at[0, *token].add(1.0)])
    made = outputs(params, pair, jnp.array([500, 500]), jnp.array([3, 3]), jnp.array([False, False]))
    difference = {
        **{block: tokens[1] - tokens[0] for block, tokens in made.hidden.items()},
        "internal": made.internal[1] - made.internal[0],
        "output": made.output[1] - made.output[0],
    }
    # The two images of a batch may round differently.
    return {name: np.abs(np.asarray(x)).max(-1) > 1e-5 for name, x in difference.items()}


def test_the_depth_of_the_published_figure_and_the_scan_directions_run_over_the_whole_network():
    for size, depths in {"S": (2, 2, 4), "B": (2, 2, 5), "L": (4, 4, 8), "XL": (4, 4, 12)}.items():
        levels = resolve_options(f"U-DiG-{size}")[1].levels
        assert [level.depth for level in levels] == [*depths, depths[1], depths[0]]
    family, options = resolve_options("U-DiG-S")
    mixers = [
        options.pattern(level).blocks[block % 4].mixer.keywords
        for level in options.levels
        for block in range(level.depth)
    ]
    assert [mixer["direction"] for mixer in mixers] == list(DIRECTIONS) * 3
    assert [mixer["num_heads"] for mixer in mixers] == [2] * 2 + [4] * 2 + [8] * 4 + [4] * 4
    assert family.name == "U-DiG" and options.patch_size == 1


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=3)
def test_shuffle_inverts_unshuffle_on_every_grid(rows, columns, channels):
    x = np.arange(2 * 4 * rows * columns * channels, dtype=np.float32).reshape(2, -1, channels)
    merged = unshuffle(jnp.asarray(x), (2 * rows, 2 * columns))
    assert merged.shape == (2, rows * columns, 4 * channels)
    np.testing.assert_array_equal(shuffle(merged, (rows, columns)), x)
    # The first token holds the upper left 2 × 2 tokens in raster order.
    first = [0, 1, 2 * columns, 2 * columns + 1]
    np.testing.assert_array_equal(merged[0, 0].reshape(4, channels), x[0, first])


@pytest.mark.parametrize("token", [(0, 0), (5, 9), (4, 3)])
def test_a_marked_token_keeps_its_place_through_levels_and_skips(traced, token):
    seen = changed(traced, isolate_tokens(traced[0]), token)
    for block, stride in enumerate(STRIDES):
        grid = coarser(GRID, stride)
        moved = np.argwhere(seen[block].reshape(grid)) * stride
        assert len(moved)
        # A coarser token on the way up covers the tokens of the coarsest one.
        side = 4 if block >= 2 else stride
        assert (moved // side == np.array(token) // side).all(), block
    for name in ("internal", "output"):
        assert (np.argwhere(seen[name]) // 4 == np.array(token) // 4).all() and seen[name][token]


@pytest.mark.parametrize("block", range(5))
def test_every_level_scans_in_its_direction_on_its_grid(traced, block):
    token, stride = (5, 6), STRIDES[block]
    others = [other for other in range(5) if other != block]
    seen = changed(traced, isolate_tokens(traced[0], others), token)[block]
    rows, columns = coarser(GRID, stride)
    order = np.arange(rows * columns).reshape(rows, columns)
    if "column" in DIRECTIONS[block % 4]:
        order = np.arange(rows * columns).reshape(columns, rows).T
    if "reversed" in DIRECTIONS[block % 4]:
        order = -order
    # What a level receives differs in the tokens that cover the same token of the coarsest level so far.
    side = 4 // stride if block > 2 else 1
    corner = np.array(token) // stride // side * side
    first = order[corner[0] : corner[0] + side, corner[1] : corner[1] + side].min()
    np.testing.assert_array_equal(seen.reshape(rows, columns), order >= first)


def test_all_levels_drop_the_same_labels(traced):
    params, outputs = traced
    x, t, y = jnp.ones((2, *GRID, 1)), jnp.array([17, 803]), jnp.array([3, 4])
    keep, drop = jnp.array([False, False]), jnp.array([True, False])
    kept, one, null = (
        outputs(params, x, t, *asked).output for asked in ((y, keep), (y, drop), (y * 0 + 5, keep))
    )
    np.testing.assert_array_equal(one[0], null[0])
    np.testing.assert_array_equal(one[1], kept[1])
    assert np.abs(kept[0] - null[0]).max() > 1e-3


def test_predictions_of_both_heads_have_the_shape_of_the_image(traced):
    params, outputs = traced
    x, t, y = jnp.ones((2, *GRID, 1)), jnp.array([17, 803]), jnp.array([3, 4])
    made = outputs(params, x, t, y, jnp.array([False, False]))
    assert made.output.shape == made.internal.shape == (2, *GRID, 2)
    shapes = [(60, 32), (15, 64), (6, 128), (15, 64), (60, 64)]
    assert [made.hidden[block].shape[1:] for block in range(5)] == shapes


@pytest.mark.parametrize("size", [(5, 8), (8, 7)])
def test_an_odd_grid_is_refused(size):
    wrong = next(side for side in size if side % 2)
    message = rf"input \w+ {wrong}; expected a multiple of 2: patch_size=1, and a level with 1/2 of the rows"
    with pytest.raises(ValueError, match=message):
        create_model("U-DiG-S", input_size=size, num_classes=3, rngs=nnx.Rngs(0))


def test_less_than_one_block_per_level_is_refused():
    with pytest.raises(
        ConfigError, match="config.model: invalid depth=4; expected at least 5, one per level"
    ):
        u_dig(model__depth=4).init_params(jax.random.key(0))


@pytest.mark.slow
def test_the_program_does_not_grow_with_the_depth():
    def length(depth):
        components = u_dig(model__depth=depth)
        params = jax.eval_shape(functools.partial(init_params, components))
        x, numbers = jnp.ones((1, 4, 4, 1)), jnp.ones(1, jnp.int32)
        return len(jax.jit(components.denoise).lower(params, x, numbers, numbers).as_text())

    assert length(48) < 1.02 * length(24)


@pytest.mark.slow
def test_scanned_levels_equal_a_loop():
    looped, scanned = (u_dig(model__depth=16, model__scan_layers=scan) for scan in (False, True))
    params = random_params(scanned)
    assert params["levels"][2]["blocks"]["groups"][0]["conv"]["bias"].shape[0] == 2
    arguments = params, jnp.ones((1, 4, 8, 1)), jnp.array([300]), jnp.array([2])
    one, other = (jax.jit(components.denoise)(*arguments) for components in (looped, scanned))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 2}, {"tensor": 2}])
def test_outputs_are_the_same_on_every_mesh(axes):
    components = u_dig(model__num_heads=2, model__conv="none")
    params = random_params(components)
    batch = {
        "x": np.random.default_rng(0).standard_normal((2, 8, 8, 1)).astype(np.float32),
        "t": np.array([3, 700], np.float32),
        "y": np.array([0, 5], np.int32),
    }

    def denoise(params, batch):
        return components.denoise(params, batch["x"], batch["t"], batch["y"])

    expected = jax.jit(denoise)(params, batch)
    mesh = make_mesh(
        tiny_settings(**{f"mesh__{name}": n for name, n in ({"data": 1} | axes).items()}).mesh, 2
    )
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, state_sharding(params, mesh)), distribute(batch, mesh)
        got = jax.jit(lambda *inputs: denoise(*inputs))(*placed)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    """An exported model without classes."""
    spec, path = ImageSpec((4, 8, 1), ()), tmp_path_factory.mktemp("export") / "u.safetensors"
    components = Components(tiny_settings(**TINY | {"sampling__steps": 2, "sampling__sampler": "ddim"}), spec)
    write_parameter_file(path, components, 7, random_params(components))
    return load(path)


@pytest.mark.slow
def test_an_exported_model_samples_another_shape(sampler):
    assert sampler(seeds=[0], size=(8, 4)).shape == (1, 8, 4, 1)


def test_a_sampled_size_that_the_levels_do_not_divide_is_refused(sampler):
    with pytest.raises(ValueError, match=r"invalid size=\(5, 4\); expected positive multiples of 2 pixels"):
        sampler(seeds=[0], size=(5, 4))


@pytest.mark.slow
def test_rows_of_all_label_tables_follow_the_names_of_classes(tmp_path):
    old, new = (
        Components(tiny_settings(**TINY), ImageSpec((4, 4, 1), names)) for names in (("a", "b"), ("b", "c"))
    )
    params = random_params(old)
    write_parameter_file(tmp_path / "u.safetensors", old, 7, params)
    start = read_warm_start(str(tmp_path / "u.safetensors"), new, abstract_state(new, mesh_of(1))["params"])
    assert start.known_rows == (True, False, True)
    fresh = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), jax.eval_shape(functools.partial(init_params, new))
    )
    found = complete(fresh, start.arrays, start.known_rows)["levels"]
    for index, level in params["levels"].items():
        rows = level["label_embed"]["table"]["embedding"]
        expected = np.stack([rows[1], 0 * rows[0], rows[2]])
        np.testing.assert_array_equal(found[index]["label_embed"]["table"]["embedding"], expected)


def test_a_teacher_block_of_another_level_is_refused():
    fields = {"auxiliary__sra_weight": 1.0, "auxiliary__sra_block": 1, "diffusion__process": "flow"}
    with pytest.raises(
        ConfigError, match="unsupported sra_teacher_block=2 with sra_block=1: got blocks of diff"
    ):
        make_auxiliary(u_dig(**fields, auxiliary__sra_teacher_block=2, model__learn_sigma=False))
