import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax.diffusion import GaussianDiffusion, gaussian
from dig_jax.diffusion.likelihood import discretized_gaussian_log_likelihood, normal_kl
from dig_jax.diffusion.schedules import space_timesteps

GOLDEN = np.load(Path(__file__).parent / "golden" / "diffusion.npz")
IMAGES = (4, 3, 2, 2)  # B, H, W, C; B, H and W differ, so that wrong broadcasting fails


@pytest.fixture(params=[("float64", 1e-6), ("float32", 1e-5)], ids=lambda param: param[0])
def precision(request):
    """(dtype, relative tolerance), with 64-bit mode on only for float64."""
    dtype, tolerance = request.param
    with jax.enable_x64(dtype == "float64"):
        yield jnp.dtype(dtype), tolerance


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def nhwc(images, dtype):
    return jnp.asarray(np.moveaxis(images, 1, -1), dtype)


def relative_error(actual, expected):
    """RMS of the difference over RMS of the expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))


def golden_denoiser(x, t):
    s = t[:, None, None, None].astype(x.dtype) / 1000
    epsilon = jnp.tanh(0.8 * x) * (0.5 + s) + 0.1 * jnp.sin(3 * x)
    return jnp.concatenate([epsilon, jnp.sin(2 * x + s)], axis=-1)


def golden_channels(channels, x, t):
    return golden_denoiser(x, t)[..., :channels]


def loss_terms(process, denoiser, x0, noise, t):
    x_t = process.corrupt(x0, noise, t)
    output = denoiser(x_t, process.timestep_input(t))
    return process.loss(output, x0=x0, noise=noise, x_t=x_t, times=t)


def random_images(seed, shape=IMAGES):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), float)


@pytest.mark.parametrize("schedule, name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules_and_posterior_tables_match_golden(schedule, name):
    diffusion = GaussianDiffusion(schedule)
    tables = {
        "betas": diffusion.betas,
        "alphas_cumprod": diffusion.alphas_cumprod,
        "posterior_variance": diffusion.posterior_variance,
        "posterior_log_variance_clipped": diffusion.posterior_log_variance,
        "posterior_mean_coef1": diffusion.posterior_mean_coef_x0,
        "posterior_mean_coef2": diffusion.posterior_mean_coef_xt,
    }
    for key, table in tables.items():
        np.testing.assert_allclose(table, GOLDEN[f"{name}/{key}"], rtol=1e-9, err_msg=key)


def test_forward_and_reverse_process_match_golden(precision):
    dtype, tolerance = precision
    diffusion = GaussianDiffusion()
    x0, noise = nhwc(GOLDEN["x_start"], dtype), nhwc(GOLDEN["noise"], dtype)
    t = jnp.asarray(GOLDEN["t"], jnp.int32)
    prediction = jax.jit(lambda x0, t: diffusion.p_mean_variance(golden_denoiser(x0, t), x0, t))(x0, t)
    actual = {
        "q_sample": diffusion.corrupt(x0, noise, t),
        "p_mean_variance/mean": prediction.mean,
        "p_mean_variance/variance": jnp.exp(prediction.log_variance),
        "p_mean_variance/log_variance": prediction.log_variance,
        "p_mean_variance/pred_xstart": prediction.x0,
    }
    for key, images in actual.items():
        assert images.dtype == dtype
        assert relative_error(images, nhwc(GOLDEN[key], dtype)) < tolerance, key


def golden_loss(dtype):
    x0, noise = nhwc(GOLDEN["x_start"], dtype), nhwc(GOLDEN["noise"], dtype)
    t = jnp.asarray(GOLDEN["t"], jnp.int32)
    return jax.jit(partial(loss_terms, GaussianDiffusion(), golden_denoiser))(x0, noise, t)


def test_loss_terms_match_golden(precision):
    # The reference rounds its tables to float32, which moves its bound by 2e-6 at t = 0, where σ is 0.007.
    dtype, tolerance = precision
    terms = golden_loss(dtype)
    assert terms.keys() == {"loss", "mse", "vb"}
    for key, values in terms.items():
        np.testing.assert_allclose(values, GOLDEN[key], rtol=max(tolerance, 3e-6), err_msg=key)


def test_loss_terms_match_golden_exactly_with_tables_rounded_like_its_own(x64, monkeypatch):
    def lookup_in_float32(table, t, x):
        return jnp.asarray(np.float32(table)).astype(x.dtype)[t][:, None, None, None]

    monkeypatch.setattr(gaussian, "lookup", lookup_in_float32)
    for key, values in golden_loss("float64").items():
        np.testing.assert_allclose(values, GOLDEN[key], rtol=1e-10, err_msg=key)


@pytest.mark.parametrize("steps", ["250", "50", "ddim50", "ddim25", "10,15,20"])
def test_respaced_timesteps_and_betas_match_golden(steps):
    process = GaussianDiffusion().respaced(steps)
    np.testing.assert_array_equal(process.timestep_map, GOLDEN[f"respaced/{steps}/timestep_map"])
    np.testing.assert_allclose(process.betas, GOLDEN[f"respaced/{steps}/betas"], rtol=1e-9)


@given(num_steps=st.integers(2, 1200), data=st.data())
def test_a_number_of_steps_is_spaced_evenly_from_first_to_last(num_steps, data):
    steps = data.draw(st.integers(2, num_steps))
    kept = space_timesteps(num_steps, steps)
    assert len(kept) == steps
    assert (kept[0], kept[-1]) == (0, num_steps - 1)
    gaps = np.diff(kept)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


@given(counts=st.lists(st.integers(1, 20), min_size=2, max_size=5))
def test_sections_take_their_count_from_equal_parts(counts):
    kept = np.array(space_timesteps(100, ",".join(map(str, counts))))
    sections = np.array_split(np.arange(100), len(counts))
    assert [np.isin(kept, section).sum() for section in sections] == counts
    assert (np.diff(kept) > 0).all()


@given(steps=st.integers(2, 1000), schedule=st.sampled_from(["linear", "cosine"]))
def test_respacing_keeps_the_noise_level_of_every_kept_timestep(steps, schedule):
    original = GaussianDiffusion(schedule)
    process = original.respaced(steps)
    np.testing.assert_allclose(
        np.cumprod(process.alphas), original.alphas_cumprod[process.timestep_map], rtol=1e-9
    )


def test_respacing_twice_maps_to_original_timesteps():
    once = GaussianDiffusion().respaced("ddim100")
    np.testing.assert_array_equal(once.respaced("ddim10").timestep_map, np.arange(0, 1000, 100))


def test_the_denoiser_of_a_respaced_process_sees_original_timesteps():
    process = GaussianDiffusion(learn_sigma=False).respaced(4)

    def denoiser(x, t):
        return jnp.broadcast_to(t[:, None, None, None], x.shape).astype(x.dtype)

    zeros = jnp.zeros(IMAGES)
    terms = jax.jit(partial(loss_terms, process, denoiser))(zeros, zeros, jnp.arange(4))
    np.testing.assert_allclose(terms["mse"], np.array([0, 333, 666, 999]) ** 2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_q_sample_has_the_moments_of_the_markov_chain(schedule, x64):
    diffusion = GaussianDiffusion(schedule)
    mean, variance, moments = 1.0, 0.0, []
    for beta in diffusion.betas:
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        moments.append((mean, variance))
    t, ones = jnp.arange(1000), jnp.ones((1000, 1, 1, 1))
    np.testing.assert_allclose(diffusion.corrupt(ones, 0 * ones, t).ravel(), [m for m, _ in moments])
    np.testing.assert_allclose(diffusion.corrupt(0 * ones, ones, t).ravel() ** 2, [v for _, v in moments])


def test_q_posterior_is_the_product_of_prior_and_likelihood(x64):
    diffusion = GaussianDiffusion("cosine", num_steps=4)
    t = jnp.arange(1, 4)
    x0, x_t = random_images(0, (3, 2, 2, 1)), random_images(1, (3, 2, 2, 1))
    mean, variance, log_variance = diffusion.q_posterior(x0, x_t, t)

    beta, alpha_bar_prev = (
        diffusion.betas[1:, None, None, None],
        diffusion.alphas_cumprod[:-1, None, None, None],
    )
    precision = 1 / (1 - alpha_bar_prev) + (1 - beta) / beta
    weighted = np.sqrt(alpha_bar_prev) / (1 - alpha_bar_prev) * x0 + np.sqrt(1 - beta) / beta * x_t
    np.testing.assert_allclose(variance, 1 / precision)
    np.testing.assert_allclose(log_variance, -np.log(precision))
    np.testing.assert_allclose(mean, weighted / precision)


def test_q_posterior_at_the_first_step_is_x0():
    x0, x_t = random_images(0), random_images(1)
    mean, variance, log_variance = GaussianDiffusion().q_posterior(x0, x_t, jnp.zeros(4, jnp.int32))
    np.testing.assert_array_equal(mean, x0)
    assert not variance.any()
    assert np.isfinite(log_variance).all()


def test_noise_and_x0_convert_into_each_other(x64):
    diffusion, t = GaussianDiffusion(), jnp.array([0, 5, 500, 999])
    x0, noise = random_images(0), random_images(1)
    x_t = diffusion.corrupt(x0, noise, t)
    np.testing.assert_allclose(diffusion.predict_x0(x_t, t, noise), x0, atol=1e-9)
    np.testing.assert_allclose(diffusion.predict_epsilon(x_t, t, x0), noise, atol=1e-9)


@given(mean=st.floats(-3, 3), log_variance=st.floats(-5, 5))
@settings(max_examples=20)
def test_kl_of_identical_gaussians_is_zero(mean, log_variance):
    assert normal_kl(*map(jnp.float32, (mean, log_variance, mean, log_variance))) == 0


def test_kl_equals_its_integral(x64):
    mean1, log_variance1, mean2, log_variance2 = 0.3, -0.5, -0.2, 0.4
    x = np.linspace(-12, 12, 20001)

    def log_density(mean, log_variance):
        return -0.5 * (np.log(2 * np.pi) + log_variance + (x - mean) ** 2 / np.exp(log_variance))

    p, q = log_density(mean1, log_variance1), log_density(mean2, log_variance2)
    expected = np.trapezoid(np.exp(p) * (p - q), x)
    actual = normal_kl(*map(jnp.float64, (mean1, log_variance1, mean2, log_variance2)))
    np.testing.assert_allclose(actual, expected, rtol=1e-8)


LOG_LIKELIHOOD = jax.jit(discretized_gaussian_log_likelihood)


@given(mean=st.floats(-1.5, 1.5), log_sigma=st.floats(-6, 1))
@settings(max_examples=20)
def test_decoder_likelihood_sums_to_one_over_all_levels(mean, log_sigma):
    levels = jnp.linspace(-1, 1, 256)
    log_likelihood = LOG_LIKELIHOOD(levels, jnp.float32(mean), jnp.float32(log_sigma))
    np.testing.assert_allclose(jnp.exp(log_likelihood).sum(), 1, rtol=3e-5)


def test_the_bound_of_the_true_posterior_is_zero(x64):
    diffusion, t = GaussianDiffusion(), jnp.array([1, 10, 500, 999])
    x0, noise = random_images(0), random_images(1)

    def true_noise_least_variance(x, t):
        return jnp.concatenate([noise, jnp.full_like(noise, -1)], axis=-1)

    terms = jax.jit(partial(loss_terms, diffusion, true_noise_least_variance))(x0, noise, t)
    np.testing.assert_array_equal(terms["mse"], 0)
    np.testing.assert_allclose(terms["vb"], 0, atol=1e-12)


def test_losses_weigh_their_terms_as_documented():
    x0, noise, t = random_images(0), random_images(1), jnp.array([0, 1, 10, 39])
    for learn_sigma in (True, False):
        process = GaussianDiffusion(learn_sigma=learn_sigma).respaced(40)
        expected = {
            "mse": lambda mse, vb, learned=learn_sigma: mse + learned * vb,
            "rescaled_mse": lambda mse, vb, learned=learn_sigma: mse + learned * vb * 40 / 1000,
            "kl": lambda mse, vb: vb,
            "rescaled_kl": lambda mse, vb: 40 * vb,
        }
        for loss_type, combine in expected.items():
            process = dataclasses.replace(process, loss_type=loss_type)
            channels = 4 if learn_sigma else 2
            denoiser = partial(golden_channels, channels)
            terms = jax.jit(partial(loss_terms, process, denoiser))(x0, noise, t)
            assert (terms["vb"] > 0).all()
            np.testing.assert_allclose(terms["loss"], combine(terms["mse"], terms["vb"]), rtol=1e-6)


@pytest.mark.parametrize("loss_type", ["mse", "kl"])
def test_the_bound_reaches_the_mean_only_where_it_is_the_only_loss(loss_type):
    diffusion = GaussianDiffusion(loss_type=loss_type)
    x0, noise, t = random_images(0), random_images(1), jnp.array([0, 1, 10, 500])

    @jax.jit
    def gradients(output):
        def total(output, key):
            return loss_terms(diffusion, lambda x, t: output, x0, noise, t)[key].sum()

        return {key: jax.grad(total)(output, key) for key in ("loss", "mse", "vb")}

    grads = gradients(random_images(2, (*IMAGES[:-1], 4)))
    epsilon = {key: grad[..., :2] for key, grad in grads.items()}
    variance = {key: grad[..., 2:] for key, grad in grads.items()}
    assert all(np.abs(variance["loss"]).max(axis=(1, 2, 3)) > 0)
    np.testing.assert_array_equal(variance["loss"], variance["vb"])
    if loss_type == "mse":
        assert not epsilon["vb"].any()
        np.testing.assert_array_equal(epsilon["loss"], epsilon["mse"])
    else:
        assert all(np.abs(epsilon["vb"]).max(axis=(1, 2, 3)) > 0)


@pytest.mark.parametrize("fixed_variance", ["small", "large"])
def test_fixed_variances_are_the_bounds_of_the_learned_one(fixed_variance):
    learned, x, t = GaussianDiffusion(), random_images(0), jnp.array([0, 1, 500, 999])
    fixed = GaussianDiffusion(learn_sigma=False, fixed_variance=fixed_variance)
    v = jnp.full_like(x, -1 if fixed_variance == "small" else 1)
    expected = learned.p_mean_variance(jnp.concatenate([x, v], axis=-1), x, t)
    actual = fixed.p_mean_variance(x, x, t)
    np.testing.assert_allclose(actual.log_variance[1:], expected.log_variance[1:], rtol=1e-6)
    np.testing.assert_array_equal(actual.mean, expected.mean)
    np.testing.assert_allclose(actual.log_variance[0], learned.posterior_log_variance[1], rtol=1e-6)


def test_clipping_limits_x0_and_keeps_noise_and_mean_consistent():
    diffusion, t = GaussianDiffusion(learn_sigma=False), jnp.array([0, 10, 500, 900])
    x_t, epsilon = 2 * random_images(0), random_images(1)
    free = diffusion.p_mean_variance(epsilon, x_t, t)
    clipped = diffusion.p_mean_variance(epsilon, x_t, t, clip=True)
    assert np.abs(free.x0).max() > 1
    np.testing.assert_array_equal(clipped.x0, np.clip(free.x0, -1, 1))
    np.testing.assert_allclose(diffusion.corrupt(clipped.x0, clipped.epsilon, t), x_t, atol=1e-5)
    np.testing.assert_array_equal(clipped.mean, diffusion.q_posterior(clipped.x0, x_t, t)[0])


def test_a_timestep_out_of_range_gives_nan_for_its_image_only():
    x0 = random_images(0)
    x_t = GaussianDiffusion().corrupt(x0, x0, jnp.array([-1, 0, 999, 1000]))
    np.testing.assert_array_equal(np.isnan(x_t).all(axis=(1, 2, 3)), [True, False, False, True])
    assert np.isfinite(x_t[1:3]).all()


def test_a_process_is_a_static_argument_that_does_not_retrace_when_equal():
    traces = []

    def f(diffusion, x0):
        traces.append(diffusion)
        return diffusion.corrupt(x0, x0, jnp.zeros(4, jnp.int32))

    f = jax.jit(f, static_argnums=0)
    f(GaussianDiffusion().respaced(10), random_images(0))
    f(GaussianDiffusion().respaced(10), random_images(1))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"schedule": "quadratic"}, "invalid schedule: got 'quadratic'; expected one of linear, cosine$"),
        ({"loss_type": "rescaled_mes"}, "invalid loss_type: got .*; did you mean 'rescaled_mse'"),
        ({"fixed_variance": "medium"}, "invalid fixed_variance: got 'medium'; expected one of small, large"),
        ({"num_steps": 20}, "num_steps too small: got 20; expected at least 21 for schedule 'linear'"),
        ({"num_steps": 1, "schedule": "cosine"}, "num_steps too small: got 1; expected at least 2 "),
        ({"timesteps": (3,)}, r"invalid timesteps: got \[3\]; expected at least 2 increasing"),
        ({"timesteps": (3, 3, 5)}, r"invalid timesteps: got \[3, 3, 5\]"),
        ({"timesteps": (0, 1000)}, "invalid timesteps: .* in 0 … 999"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**fields)


@pytest.mark.parametrize(
    "steps, message",
    [
        (1, "too few steps: got 1; expected at least 2"),
        (1001, "invalid steps: got 1001; expected 1 … 1000 timesteps in each section"),
        (-5, "invalid steps: got -5; expected a number such as 50, numbers .*"),
        ("10,0", "invalid steps: got '10,0'; expected 1 … 500 timesteps in each section"),
        ("fast", "invalid steps: got 'fast'; expected a number"),
        ("ddim999", "invalid steps: got 'ddim999'; expected a count that an integer stride gives for 1000"),
    ],
)
def test_bad_steps_are_named(steps, message):
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion().respaced(steps)


def test_a_denoiser_with_the_wrong_channels_is_named():
    x0 = random_images(0)
    with pytest.raises(
        ValueError,
        match=r"denoiser's output: got \(4, 3, 2, 2\); expected \(4, 3, 2, 4\) for learn_sigma=True",
    ):
        loss_terms(GaussianDiffusion(), lambda x, t: x, x0, x0, jnp.zeros(4, jnp.int32))
