"""Solvers on the exact flow of Gaussian data: order, moments and evaluations."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_flow import (  # noqa: F401 (float64 is an autouse fixture)
    MEAN,
    STD,
    Interior,
    denoiser,
    float64,
    flow,
    no_noise,
    noise_of,
    start,
)

from dig_jax.diffusion import DDIM, DDPM, SAMPLERS, FlowMatching, GaussianDiffusion, Path, classifier_free
from dig_jax.diffusion.path import PATHS
from dig_jax.diffusion.samplers import DPMpp2M, DPMpp2MSDE, EDMHeun, Euler, EulerMaruyama, Heun, UniPC
from dig_jax.diffusion.samplers.sde import FORMS, LAST_STEPS

ORDERS = {Euler: 1, DDIM: 1, Heun: 2, DPMpp2M: 2, UniPC: 3}
ON_BOTH = [Euler, DDIM, Heun, DPMpp2M, UniPC]


def measured_order(sampler, process, denoise, expected):
    """The order from 320 and 640 steps."""
    errors = []
    for steps in (320, 640):
        drawn = sampler(steps=steps)(process, denoise, start(), no_noise)
        errors.append(float(jnp.abs(drawn - expected).max()))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("sampler", "order"), ORDERS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_solvers_have_their_order(sampler, order, path):
    process = Interior(Path(path))
    expected = flow(process.path, start(), 0.98, 0.02)
    assert abs(measured_order(sampler, process, denoiser(process), expected) - order) < 0.1


@pytest.mark.parametrize(("sampler", "order"), ORDERS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_solvers_have_their_order_with_guidance(sampler, order):
    process, scale = Interior(), 2.5
    means = jnp.array([0.2, -0.4])  # class 0, and the null class 1

    def labelled(x, t, y):
        return denoiser(process, means[y][:, None, None, None])(x, t)

    guided = classifier_free(labelled, jnp.zeros(4, int), 1, scale)
    expected = flow(process.path, start(), 0.98, 0.02, mean=-0.4 + scale * 0.6)
    assert abs(measured_order(sampler, process, guided, expected) - order) < 0.1


@pytest.mark.parametrize("churn", [0.0, 20.0])
def test_the_heun_of_edm_has_order_two_without_churn_and_reaches_the_data(churn):
    process = FlowMatching()
    if churn:
        drawn = EDMHeun(steps=100, s_churn=churn)(
            process, denoiser(process), noise_of((4096, 1, 1, 1))(10**6), noise_of((4096, 1, 1, 1))
        )
        assert_moments(drawn)
        return
    errors = [
        float(jnp.abs(EDMHeun(steps=n)(process, denoiser(process), start(), no_noise) - exact).max())
        for exact in [flow(process.path, 80 / 81 * start(), 80 / 81, 0)]
        for n in (80, 160)
    ]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.1


@pytest.mark.parametrize("prediction", ["velocity", "x", "noise", "v"])
@pytest.mark.parametrize("path", PATHS)
def test_solvers_reach_clean_images_from_pure_noise(path, prediction):
    process = FlowMatching(Path(path), prediction)
    for sampler in ON_BOTH:
        drawn = sampler(steps=100)(process, denoiser(process), start(), no_noise)
        np.testing.assert_allclose(drawn, flow(process.path, start(), 1, 0), atol=0.05)


def test_on_the_linear_path_ddim_is_euler():
    process = FlowMatching()
    drawn = [sampler(steps=7)(process, denoiser(process), start(), no_noise) for sampler in (DDIM, Euler)]
    np.testing.assert_allclose(*drawn, rtol=1e-12)


def gaussian_denoiser(process):
    """E[ε | x_t] for data N(MEAN, STD²) on DDPM's tables."""
    signal = np.sqrt(process.alphas_cumprod)
    gain = np.sqrt(1 - signal**2) / (signal**2 * STD**2 + 1 - signal**2)

    def denoise(x, t):
        broadcast = (jnp.asarray(table)[t][:, None, None, None] for table in (signal, gain))
        alpha, scale = broadcast
        return scale * (x - alpha * MEAN)

    return denoise


@pytest.mark.parametrize("sampler", ON_BOTH)
def test_solvers_follow_the_flow_of_ddpm(sampler):
    process = GaussianDiffusion(learn_sigma=False)
    signal = math.sqrt(process.alphas_cumprod[-1])
    scale = STD / math.sqrt(signal**2 * STD**2 + 1 - signal**2)
    expected = MEAN + scale * (start() - signal * MEAN)
    errors = []
    for steps in (20, 200):
        drawn = sampler(steps=steps)(process, gaussian_denoiser(process), start(), no_noise)
        errors.append(float(jnp.abs(drawn - expected).max()))
    assert errors[1] < min(0.02, errors[0])


def assert_moments(drawn):
    """Mean and variance of N(MEAN, STD²) within 3 standard errors."""
    count = drawn.size
    assert abs(float(drawn.mean()) - MEAN) < 3 * STD / math.sqrt(count)
    assert abs(float(drawn.var()) / STD**2 - 1) < 3 * math.sqrt(2 / count)


@pytest.mark.parametrize(
    ("form", "path"),
    [*((form, "linear") for form in FORMS), ("sigma", "trigonometric"), ("sbdm", "vp")],
)
def test_euler_maruyama_reproduces_the_moments_of_the_data(form, path):
    process, noise = FlowMatching(Path(path)), noise_of((2048, 1, 1, 1))
    sampler = EulerMaruyama(steps=1000, form=form, last_size=0.002)
    assert_moments(sampler(process, denoiser(process), noise(10**6), noise))


@pytest.mark.parametrize("sampler", [DPMpp2MSDE(steps=300), DDIM(steps=500, eta=1.0)])
def test_stochastic_solvers_reproduce_the_moments_of_the_data(sampler):
    process, noise = FlowMatching(), noise_of((4096, 1, 1, 1))
    assert_moments(sampler(process, denoiser(process), noise(10**6), noise))


@pytest.mark.parametrize("last", LAST_STEPS)
def test_the_last_step_of_euler_maruyama_adds_no_noise(last):
    process, noise = FlowMatching(), start(5, (4, 4, 2, 2, 1))
    sampler = EulerMaruyama(steps=4, last_step=last)

    @jax.jit
    def draw(noise):
        return sampler(process, denoiser(process), start(), lambda i: noise[i])

    np.testing.assert_array_equal(draw(noise), draw(noise.at[3].set(1e6)))
    assert not np.allclose(draw(noise), draw(noise.at[2].add(1.0)))


def test_the_last_steps_of_euler_maruyama_differ_as_they_say():
    process, drawn = FlowMatching(), {}
    for last in LAST_STEPS:
        sampler = EulerMaruyama(steps=2, last_step=last, norm=0.0)  # without noise: an Euler step to 0.04
        drawn[last] = sampler(process, denoiser(process), start(), noise_of((4, 2, 2, 1)))
    x = start() - 0.96 * denoiser(process)(start(), jnp.full(4, 1000.0))
    velocity = denoiser(process)(x, jnp.full(4, 40.0))
    for value in drawn.values():  # on the linear path, all three are x - t v where w = 0
        np.testing.assert_allclose(value, x - 0.04 * velocity, rtol=1e-9)
    noisy = {
        last: EulerMaruyama(steps=2, last_step=last)(
            process, denoiser(process), start(), lambda i: 0 * start()
        )
        for last in LAST_STEPS
    }
    assert float(jnp.abs(noisy["mean"] - noisy["euler"]).max()) > 1e-3


EVALUATIONS = {
    "ddpm": 10,
    "ddim": 10,
    "euler": 10,
    "heun": 19,
    "dpmpp_2m": 10,
    "dpmpp_2m_sde": 10,
    "unipc": 10,
    "euler_maruyama": 10,
    "edm_heun": 19,
}


@pytest.mark.parametrize(
    ("name", "process"),
    [(name, FlowMatching()) for name in EVALUATIONS if name != "ddpm"]
    + [
        (name, GaussianDiffusion(learn_sigma=False))
        for name in EVALUATIONS
        if name not in ("euler_maruyama", "edm_heun")
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_steps_mean_what_they_say_and_evaluations_are_counted(name, process):
    sampler, seen = SAMPLERS[name](steps=10), []
    sampler.check(process)

    def denoise(x, t):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t, ordered=True)
        return 0 * x

    drawn, trajectory = sampler(process, denoise, start(), noise_of((4, 2, 2, 1)), return_trajectory=True)
    jax.block_until_ready(drawn)
    jax.effects_barrier()
    assert sampler.evaluations(process) == len(seen) == EVALUATIONS[name]
    assert (np.diff(seen) <= 0).all()
    assert min(seen) >= 0  # times out of range would be clamped silently
    assert len(trajectory) == 10
    if isinstance(process, FlowMatching) and name not in ("edm_heun", "euler_maruyama"):
        steps = [t for t, before in zip(seen, [None, *seen], strict=False) if t != before]
        np.testing.assert_allclose(steps, 1000 * np.linspace(1, 0, 11)[:-1])


def test_heun_evaluates_at_the_predicted_point_not_again_at_the_old_one():
    # One step from t = 0.8 to 0.4 on a velocity that depends on x: a stale prediction would give Euler.
    @dataclasses.dataclass(frozen=True)
    class OneStep(FlowMatching):
        def knots(self, steps):
            return self.knots_at(np.array([0.8, 0.4]))

    def velocity(x, timesteps):
        return x * (timesteps / 1000)[:, None, None, None]

    x, h = start(), -0.4
    predicted = x + h * 0.8 * x
    expected = x + h / 2 * (0.8 * x + 0.4 * predicted)
    drawn = Heun(steps=1)(OneStep(), velocity, x, no_noise)
    np.testing.assert_allclose(drawn, expected, rtol=1e-12)
    assert not np.allclose(drawn, predicted)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_the_program_is_one_scan_with_one_evaluation_in_its_body(name):
    process = GaussianDiffusion(learn_sigma=False) if name == "ddpm" else FlowMatching()
    sampler, calls = SAMPLERS[name](steps=50), []

    def denoise(x, t):
        calls.append(t.shape)
        return 0.5 * x

    program = jax.make_jaxpr(lambda x: sampler(process, denoise, x, noise_of((4, 2, 2, 1))))(start())
    lengths = [eqn.params["length"] for eqn in program.eqns if eqn.primitive.name == "scan"]
    assert lengths == [sampler.evaluations(process)]
    assert calls == [(4,)]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_float32_samples_stay_close_to_float64(name):
    process = GaussianDiffusion(learn_sigma=False) if name == "ddpm" else FlowMatching()
    denoise = gaussian_denoiser(process) if name == "ddpm" else denoiser(process)
    sampler = SAMPLERS[name](steps=50)
    noise = functools.partial(jax.random.normal, jax.random.key(0), (4, 2, 2, 1))
    wide = sampler(process, denoise, start(), lambda i: noise())
    narrow = sampler(process, denoise, start().astype(jnp.float32), lambda i: noise(jnp.float32))
    assert narrow.dtype == jnp.float32
    reference = sampler(
        process, denoise, start().astype(jnp.float32).astype(jnp.float64), lambda i: noise(jnp.float32)
    )
    np.testing.assert_allclose(narrow, reference, atol=2e-5)
    assert wide.dtype == jnp.float64


@pytest.mark.parametrize(
    ("sampler", "fields", "message"),
    [
        (
            EulerMaruyama,
            {"form": "sgima"},
            "invalid form: got 'sgima'; expected one of .*did you mean 'sigma'",
        ),
        (
            EulerMaruyama,
            {"last_step": "none"},
            "invalid last_step: got 'none'; expected one of mean, tweedie",
        ),
        (EulerMaruyama, {"last_size": 1.0}, "invalid last_size: got 1.0; expected a number between 0 and 1"),
        (EulerMaruyama, {"norm": -1.0}, "invalid norm: got -1.0; expected zero or a positive number"),
        (EDMHeun, {"sigma_min": 90.0}, "invalid sigma_min, sigma_max: got 90.0, 80.0; expected"),
        (EDMHeun, {"rho": 0.0}, "invalid rho: got 0.0; expected a positive number"),
        (EDMHeun, {"s_churn": -1.0}, "invalid s_churn: got -1.0; expected zero or a positive number"),
    ],
)
def test_invalid_options_are_named(sampler, fields, message):
    with pytest.raises(ValueError, match=message):
        sampler(**fields)


@pytest.mark.parametrize("sampler", [EulerMaruyama(steps=5), EDMHeun(steps=5)])
def test_solvers_of_continuous_time_refuse_ddpm(sampler):
    with pytest.raises(ValueError, match="unsupported process for .*: got GaussianDiffusion; expected Flow"):
        sampler.check(GaussianDiffusion())


def test_the_ancestral_sampler_refuses_flow_matching():
    with pytest.raises(ValueError, match="unsupported process for DDPM: got FlowMatching; expected Gaussian"):
        DDPM(steps=5).check(FlowMatching())
