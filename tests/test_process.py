"""Flow matching trains and samples through the same code as Gaussian diffusion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax.components import Components
from dig_jax.diffusion import DDPM, FlowMatching, GaussianDiffusion, Process
from dig_jax.sampling.sampler import Sampler
from dig_jax.testing import PixelComponents, mesh_of, random_params, tiny_settings
from dig_jax.training.heldout import HeldoutLoss
from dig_jax.training.objectives.denoising import draw
from dig_jax.training.state import Purpose, init_state, purpose_key
from dig_jax.training.step import train_step
from dig_jax.training.train_setup import TrainSetup

SIZE = 8


SETTINGS = tiny_settings(model__name="DiT-S/2", model__learn_sigma=False, diffusion__process="flow")


def images(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((SIZE, 4, 4, 1)), jnp.float32)


@pytest.mark.parametrize("process", [GaussianDiffusion(), FlowMatching()], ids=["gaussian", "flow"])
def test_processes_draw_times_by_image_and_spread_them_evenly(process):
    assert isinstance(process, Process)
    count, bins = 4000, 4
    times = process.sample_times(jax.random.split(jax.random.key(0), count))
    drawn = np.bincount(process.level_index(times, bins), minlength=bins) / count
    np.testing.assert_allclose(drawn, 1 / bins, atol=4 * np.sqrt(0.1875 / count))
    spread = process.times_at(jnp.arange(12) / 12)
    np.testing.assert_array_equal(process.level_index(spread, bins), np.repeat(range(bins), 3))
    for each in (times, spread):
        assert 0 <= process.timestep_input(each).min() <= process.timestep_input(each).max() < 1000
    noisy = process.corrupt(0 * images(0), images(1), spread[-SIZE:])
    assert (np.diff(noisy.std(axis=(1, 2, 3)) / images(1).std(axis=(1, 2, 3))) > 0).all()


def test_a_second_process_trains_through_the_same_step():
    setup = TrainSetup.of(PixelComponents(SETTINGS))
    state = init_state(setup, setup.components.init_params(jax.random.key(0)))
    batch = {"image": images(0), "label": jnp.arange(SIZE) % 5}
    new, metrics = jax.jit(functools.partial(train_step, setup))(state, batch)
    assert (int(new["step"]), int(new["skipped_steps"])) == (1, 0)

    @jax.jit
    def expected(params):
        key = jax.random.fold_in(purpose_key(setup.components, Purpose.TRAIN), 0)
        times, noise, drop, _ = draw(setup.components, key, jnp.arange(SIZE))
        t = times[:, None, None, None]
        x_t = (1 - t) * batch["image"] + t * noise
        velocity = setup.components.denoise(params, x_t, 1000 * times, batch["label"], drop)
        return times, jnp.mean((velocity - (noise - batch["image"])) ** 2, axis=(1, 2, 3))

    times, losses = jax.device_get(expected(state["params"]))
    np.testing.assert_allclose(metrics["loss"], losses.mean(), rtol=1e-5)
    by_quarter = [losses[(times >= q / 4) & (times < (q + 1) / 4)].sum() for q in range(4)]
    np.testing.assert_allclose(metrics["loss_sum"], by_quarter, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new["params"], state["params"])
    assert min(jax.tree.leaves(moved)) > 0


def test_the_heldout_loss_of_a_second_process_uses_its_times():
    seen = []

    class Recording(Components):
        def denoise(self, params, x, t, y, drop=None):
            jax.debug.callback(lambda t: seen.append(t), t)
            return jnp.zeros_like(x)

    loss = HeldoutLoss(Recording(SETTINGS), mesh_of(1))({})
    assert loss > 1  # variance of the noise plus mean square of the images
    times = np.sort(np.concatenate(seen))[:12] / 1000
    assert np.diff(times).max() < 0.2


def test_every_part_of_sampling_works_on_a_second_process():
    components = Components(SETTINGS)
    sampler = Sampler(components, random_params(components), step=0)
    drawn = sampler([0, 1], sampler="euler", steps=2, return_latents=True)
    trajectory = sampler.trajectory([0, 1], sampler="euler", steps=2)
    assert drawn.shape == (2, 4, 4, 1)
    assert np.isfinite(drawn).all()
    assert trajectory.shape == (2, 2, 4, 4, 1)


def test_a_sampler_that_does_not_support_the_process_says_so():
    with pytest.raises(ValueError, match="unsupported process for DDPM: got FlowMatching; expected Gaussian"):
        DDPM(steps=2).check(FlowMatching())
