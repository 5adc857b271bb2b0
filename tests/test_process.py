"""A second process, the linear path of flow matching defined here, trains and samples like the first."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax.components import Components
from dig_jax.diffusion import DDIM, SAMPLERS, BaseSampler, GaussianDiffusion, Process, make_sampler
from dig_jax.sampling.sampler import Sampler
from dig_jax.testing import PixelComponents, mesh_of, random_params, tiny_settings
from dig_jax.training.heldout import HeldoutLoss
from dig_jax.training.objectives.denoising import draw
from dig_jax.training.state import Purpose, init_state, purpose_key
from dig_jax.training.step import train_step
from dig_jax.training.train_setup import TrainSetup

SIZE = 8


@dataclasses.dataclass(frozen=True)
class LinearPath:
    """x_t = (1 - t) x_0 + t ε for t in [0, 1]; the denoiser predicts the velocity ε - x_0."""

    def sample_times(self, keys):
        return jax.vmap(jax.random.uniform)(keys)

    def times_at(self, fractions):
        return fractions

    def level_index(self, times, count):
        return (times * count).astype(jnp.int32)

    def timestep_input(self, times):
        return 1000 * times

    def corrupt(self, x0, noise, times):
        t = times[:, None, None, None]
        return (1 - t) * x0 + t * noise

    def targets(self, x0, noise, times):
        return noise - x0

    def loss(self, output, *, x0, noise, x_t, times):
        error = output - self.targets(x0, noise, times)
        return {"loss": jnp.mean(error**2, axis=(1, 2, 3))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(BaseSampler):
    """x ← x + Δt · velocity, in equal steps from t = 1 to t = 0."""

    steps: int = 10

    def check(self, process):
        if not isinstance(process, LinearPath):
            raise ValueError(f"unsupported process for Euler: got {process}; expected LinearPath")

    def discretize(self, process, denoiser, noise):
        def step(x, i):
            t = jnp.full(x.shape[:1], 1 - i / self.steps)
            velocity = denoiser(x, process.timestep_input(t))
            return x - velocity / self.steps, x - t[:, None, None, None] * velocity

        return self.steps, step


class FlowComponents(Components):
    """Components with the linear path as their process."""

    diffusion = LinearPath()


class PixelFlow(PixelComponents):
    """The same with a network that compiles fast."""

    diffusion = LinearPath()


SETTINGS = tiny_settings(model__name="DiT-S/2", model__learn_sigma=False)


def images(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((SIZE, 4, 4, 1)), jnp.float32)


@pytest.mark.parametrize("process", [GaussianDiffusion(), LinearPath()], ids=["gaussian", "linear"])
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
    setup = TrainSetup.of(PixelFlow(SETTINGS))
    state = init_state(setup, setup.components.init_params(jax.random.key(0)))
    batch = {"image": images(0), "label": jnp.arange(SIZE) % 5}
    new, metrics = jax.jit(functools.partial(train_step, setup))(state, batch)
    assert (int(new["step"]), int(new["skipped_steps"])) == (1, 0)

    @jax.jit
    def expected(params):
        key = jax.random.fold_in(purpose_key(setup.components, Purpose.TRAIN), 0)
        times, noise, drop = draw(setup.components, key, jnp.arange(SIZE))
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

    class Recording(FlowComponents):
        def denoise(self, params, x, t, y, drop=None):
            jax.debug.callback(lambda t: seen.append(t), t)
            return jnp.zeros_like(x)

    loss = HeldoutLoss(Recording(SETTINGS), mesh_of(1))({})
    assert loss > 1  # variance of the noise plus mean square of the images
    times = np.sort(np.concatenate(seen))[:12] / 1000
    assert np.diff(times).max() < 0.2


def test_euler_follows_the_exact_flow_of_gaussian_data():
    # For data N(m, s²) the flow maps noise z to m + s z; the velocity is E[ε - x_0 | x_t].
    mean, std = 0.7, 0.3

    def velocity(x, timesteps):
        t = timesteps[:, None, None, None] / 1000
        gain = (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)
        return gain * (x - (1 - t) * mean) - mean

    def no_noise(i):
        raise AssertionError("Euler is deterministic")

    def error(steps):
        drawn = Euler(steps=steps)(LinearPath(), velocity, images(0), no_noise)
        return np.abs(drawn - (mean + std * images(0))).max()

    errors = [error(100), error(200)]
    assert errors[0] < 0.02
    assert errors[1] < 0.6 * errors[0]


def test_a_sampler_is_registered_by_one_line(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "euler", Euler)
    assert make_sampler("euler") == Euler(steps=10)
    assert make_sampler("euler", steps=3) == Euler(steps=3)
    components = FlowComponents(SETTINGS)
    sampler = Sampler(components, random_params(components), step=0)
    drawn = sampler([0, 1], sampler="euler", steps=2, return_latents=True)
    trajectory = sampler.trajectory([0, 1], sampler="euler", steps=2)
    assert drawn.shape == (2, 4, 4, 1)
    assert np.isfinite(drawn).all()
    assert trajectory.shape == (2, 2, 4, 4, 1)


def test_a_sampler_that_does_not_support_the_process_says_so():
    with pytest.raises(ValueError, match="unsupported process for DDIM: got LinearPath; expected Gaussian"):
        DDIM(steps=2).check(LinearPath())
