"""Samplers against the schedulers of diffusers.

`test_full_loop_no_noise` of its scheduler tests: this sample and model, linear betas, 10 steps.
"""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from exact_flow import float64, no_noise  # noqa: F401 (an autouse fixture)

from dig_jax.diffusion import DDIM, GaussianDiffusion
from dig_jax.diffusion.samplers import DPMpp2M, UniPC

GOLDEN = Path(__file__).parent / "golden" / "schedulers.npz"
X = np.arange(4 * 3 * 8 * 8).reshape(3, 8, 8, 4).transpose(3, 1, 2, 0) / 768


def model(x, t):
    """The noise."""
    t = t[:, None, None, None]
    return x * t / (t + 1)


def model_of_v(x, t):
    """The noise, given that the model predicts α ε - σ x_0."""
    alpha_bar = jnp.asarray(GaussianDiffusion().alphas_cumprod)[t][:, None, None, None]
    return jnp.sqrt(alpha_bar) * model(x, t) + jnp.sqrt(1 - alpha_bar) * x


@dataclasses.dataclass(frozen=True)
class Diffusers(GaussianDiffusion):
    """Knots as in diffusers' scheduler tests: 11 evenly spaced timesteps, of which the last is not clean."""

    def knots(self, steps):
        level = super().knots(None)[1]
        times = np.linspace(0, 999, steps + 1).round()[::-1].astype(int)
        return type(super().knots(2))(times, type(level)(*(part[999 - times] for part in level)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstOrderEnd(UniPC):
    """UniPC whose last step has order 1 even if it does not end at clean images, as in diffusers."""

    def table(self, process):
        table, level = super().table(process), process.knots(self.steps).level
        scale = level.sigma[-1] / level.sigma[-2]
        weights = table.weights.copy()
        weights[-1, 0] = scale * weights[-1, 1]
        weights[-1, 0, 4] += level.alpha[-1] - scale * level.alpha[-2]
        return dataclasses.replace(table, weights=weights)


@pytest.mark.parametrize(
    ("sampler", "process", "expected"),
    [
        (FirstOrderEnd(steps=10), Diffusers(learn_sigma=False), 0.2464),
        (DPMpp2M(steps=10), Diffusers(learn_sigma=False), 0.3301),
        (DDIM(steps="ddim10", clip=True), GaussianDiffusion(learn_sigma=False), 0.223967),
    ],
    ids=["unipc", "dpmpp_2m", "ddim"],
)
def test_samplers_reach_the_values_of_diffusers_scheduler_tests(sampler, process, expected):
    assert abs(float(jnp.abs(sampler(process, model, jnp.asarray(X), no_noise)).mean()) - expected) < 1e-3


@pytest.mark.parametrize(
    ("name", "sampler", "process", "denoise"),
    [
        ("ddim", DDIM(steps="ddim10", clip=True), GaussianDiffusion(learn_sigma=False), model),
        ("dpmpp_2m", DPMpp2M(steps=10), Diffusers(learn_sigma=False), model),
        ("dpmpp_2m_v", DPMpp2M(steps=10), Diffusers(learn_sigma=False), model_of_v),
        ("unipc", FirstOrderEnd(steps=10), Diffusers(learn_sigma=False), model),
    ],
    ids=["ddim", "dpmpp_2m", "dpmpp_2m_v", "unipc"],
)
def test_every_step_is_that_of_diffusers(name, sampler, process, denoise):
    golden = np.load(GOLDEN)
    loop = sampler.discretize(process, denoise, no_noise)
    state = (jnp.asarray(X), *(jnp.zeros(X.shape) for _ in range(loop.memory)))
    np.testing.assert_array_equal(process.knots(sampler.steps).times[:-1], golden[f"{name}_timesteps"])
    for i, expected in enumerate(golden[name]):
        state, _ = loop.step(state, jnp.asarray(i))
        np.testing.assert_allclose(state[0], np.moveaxis(expected, 1, -1), atol=1e-5)
