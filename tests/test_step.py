import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax.data import batches, epoch
from dig_jax.parallel import batch_sharding, replicated, to_global
from dig_jax.testing import PixelComponents, mesh_of, random_params, tiny_components, tiny_settings
from dig_jax.training.heldout import heldout_sums, spread
from dig_jax.training.objectives.denoising import draw
from dig_jax.training.state import Purpose, init_state, purpose_key
from dig_jax.training.step import mean_gradient, train_step
from dig_jax.training.train_setup import TrainSetup

SIZE = 8
DECAYS = (0.0, 0.5, 0.9)


@functools.cache
def run(devices=1, accumulation=1):
    """(components, jitted step, its first state, mesh)."""
    components = tiny_components(
        training__ema_decays=DECAYS,
        training__accumulation=accumulation,
        optimizer__clip_norm=1.0,
        optimizer__warmup_steps=10,
    )
    setup, mesh = TrainSetup.of(components), mesh_of(devices)
    layout = replicated(mesh)
    step = jax.jit(functools.partial(train_step, setup), out_shardings=layout)
    state = init_state(setup, random_params(components))
    return components, step, jax.device_put(state, layout), mesh


@functools.cache
def batch():
    return next(batches(tiny_components().train_source, batch_size=SIZE, seed=0, num_threads=0))


def train(count, **layout):
    """The state after `count` steps on one batch, and the metrics of each step, as NumPy arrays."""
    _, step, state, mesh = run(**layout)
    metrics = []
    for _ in range(count):
        state, last = step(state, to_global(batch(), mesh))
        metrics.append(last)
    return jax.device_get((state, metrics))


def step_key(components, step):
    return jax.random.fold_in(purpose_key(components, Purpose.TRAIN), step)


def distance(a, b):
    """Relative error over all leaves together."""

    def norm(tree):
        return np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))

    return norm(jax.tree.map(np.subtract, a, b)) / norm(b)


def test_micro_batches_on_four_devices_train_like_one_batch_on_one_device():
    state, metrics = train(2, devices=4, accumulation=2)
    expected_state, expected_metrics = train(2)
    for one, expected in zip(metrics, expected_metrics, strict=True):
        for name in ("loss", "grad_norm", "loss_sum"):
            np.testing.assert_allclose(one[name], expected[name], rtol=1e-5, err_msg=name)
        np.testing.assert_array_equal(one["count"], expected["count"])
    for part in ("params", "ema", "opt_state"):
        assert distance(state[part], expected_state[part]) < 1e-5, part


def test_the_reported_norm_of_the_gradient_is_not_its_square():
    _, metrics = train(1)
    components, _, state, _ = run()
    setup, key = TrainSetup.of(components), step_key(components, 0)
    grads, _ = jax.jit(functools.partial(mean_gradient, setup))(state["params"], batch(), key)
    norm = np.sqrt(
        sum(np.sum(np.square(x, dtype=np.float64)) for x in map(np.asarray, jax.tree.leaves(grads)))
    )
    assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert not 0.9 < norm < 1.1  # where a norm and its square are alike


def test_the_draw_of_an_image_depends_neither_on_other_images_nor_on_devices():
    """Bit for bit, for the full batch, every other image as in accumulation, and four devices."""
    components = tiny_components(training__label_dropout=0.5)
    drawn = jax.jit(lambda step, indices: draw(components, step_key(components, step), indices))
    numbers, mesh = jnp.arange(SIZE), mesh_of(4)
    full = drawn(3, numbers)
    half = drawn(3, numbers[1::2])
    sharded = drawn(3, jax.device_put(numbers, batch_sharding(mesh)))
    for expected, of_half, of_sharded in zip(full[:3], half[:3], sharded[:3], strict=True):
        np.testing.assert_array_equal(of_half, expected[1::2])
        np.testing.assert_array_equal(of_sharded, expected)
        assert len(of_sharded.sharding.device_set) == 4
    noise = full.noise
    assert len(np.unique(noise)) == noise.size
    assert not np.isin(drawn(4, numbers).noise, noise).any()


def test_labels_are_dropped_at_the_given_rate_and_times_are_uniform():
    count, rate = 4000, 0.1
    components = tiny_components(training__label_dropout=rate)
    times, _, drop, _ = jax.jit(lambda: draw(components, step_key(components, 0), jnp.arange(count)))()
    assert abs(drop.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / count)
    assert times.min() < 5
    assert 994 < times.max() < 1000
    np.testing.assert_allclose(np.bincount(times // 250) / count, 0.25, atol=4 * np.sqrt(0.1875 / count))


def test_a_batch_with_nan_changes_only_the_counters():
    _, step, state, mesh = run()
    image = batch()["image"].copy()
    image[5, 0, 0] = np.nan
    new, metrics = step(state, to_global(batch() | {"image": image}, mesh))
    assert (int(new["step"]), int(new["skipped_steps"]), int(metrics["skipped"])) == (1, 1, 1)
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, new[part], state[part])
    np.testing.assert_allclose(metrics["learning_rate"], 1e-4, rtol=1e-6)
    after, metrics = step(new, to_global(batch(), mesh))
    # The schedule counts updates, not steps.
    np.testing.assert_allclose(metrics["learning_rate"], 1e-4, rtol=1e-6)
    assert (int(after["step"]), int(after["skipped_steps"]), int(metrics["skipped"])) == (2, 1, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    assert distance(after["params"], state["params"]) > 0


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 3e38, "weight_decay": 1.0}, {"learning_rate": 1.0, "weight_decay": 3e38}]
)
def test_an_update_that_overflows_changes_only_the_counters(changes):
    """Loss and gradient are finite, the new parameters are not."""
    components = PixelComponents(
        tiny_settings(**{f"optimizer__{name}": value for name, value in changes.items()})
    )
    setup = TrainSetup.of(components)
    params = jax.tree.map(lambda x: x + 1e3, components.init_params(jax.random.key(0)))
    state = init_state(setup, params)
    new, metrics = jax.jit(functools.partial(train_step, setup))(state, batch())
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert (int(new["step"]), int(new["skipped_steps"]), int(metrics["skipped"])) == (1, 1, 1)
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, new[part], state[part])


def test_averages_start_as_the_parameters_and_follow_their_closed_form():
    """decay^n · params_0 + Σ (1 - decay) · decay^(n-i) · params_i, with weights that sum to 1."""
    first = jax.device_get(run()[2])
    history = [jax.device_get(train(n)[0]["params"]) for n in (1, 2, 3)]
    averages = train(3)[0]["ema"]
    for decay in DECAYS:
        jax.tree.map(np.testing.assert_array_equal, first["ema"][str(decay)], first["params"])
        weights = [decay**3, *((1 - decay) * decay ** (3 - n) for n in (1, 2, 3))]
        expected = jax.tree.map(
            lambda *leaves, w=weights: sum(a * np.float64(x) for a, x in zip(w, leaves, strict=True)),
            first["params"],
            *history,
        )
        assert sum(weights) == 1
        assert distance(averages[str(decay)], expected) < 1e-6
    assert distance(averages["0.9"], averages["0.0"]) > 1e-4


def test_losses_by_quarter_of_the_times_add_up_to_the_loss():
    _, [metrics] = train(1)
    components = run()[0]
    t = jax.jit(lambda: draw(components, step_key(components, 0), jnp.arange(SIZE)).times)()
    np.testing.assert_array_equal(metrics["count"], np.bincount(t // 250, minlength=4))
    np.testing.assert_array_equal(metrics["loss_sum"] > 0, metrics["count"] > 0)
    np.testing.assert_allclose(metrics["loss_sum"].sum() / SIZE, metrics["loss"], rtol=1e-6)


def test_one_batch_can_be_memorized():
    state, metrics = train(100)
    losses = [step["loss"] for step in metrics]
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert state["skipped_steps"] == 0


@pytest.mark.parametrize("first", [0, 50_000, 10_000_000])
def test_heldout_images_have_evenly_spread_times_at_any_index(first):
    fractions = np.sort(spread(first + jnp.arange(1000)))
    assert np.abs(fractions - (np.arange(1000) + 0.5) / 1000).max() < 3e-3
    exact = (first + 999) * (5**0.5 - 1) / 2 % 1
    np.testing.assert_allclose(spread(jnp.array([first + 999])), exact, atol=1e-2)


def test_the_heldout_loss_depends_neither_on_the_batch_size_nor_on_padding():
    components = PixelComponents(tiny_settings())
    params = components.init_params(jax.random.key(0))
    loss = jax.jit(functools.partial(heldout_sums, components))

    def mean(size, padding=None):
        sums = []
        for number, part in enumerate(epoch(components.heldout_source, batch_size=size)):
            if padding is not None:
                part["image"][~part["mask"]] = padding
            sums.append(loss(params, part, number * size))
        total, count = map(sum, zip(*sums, strict=True))
        assert count == len(components.heldout_source) == 12
        return float(total / count)

    np.testing.assert_allclose(mean(12), mean(8), rtol=1e-6)
    assert mean(8, padding=0.3) == mean(8)
