import dataclasses
import functools
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_flow import no_noise

from dig_jax.diffusion import DDIM, DDPM, SAMPLERS, GaussianDiffusion, make_sampler

GOLDEN = np.load(Path(__file__).parent / "golden" / "diffusion.npz")
MEAN, STD = 0.7, 0.3
NORMAL = jnp.asarray(np.random.default_rng(0).standard_normal((22, 2, 3, 5, 2)), jnp.float32)
X_T, NOISE = NORMAL[0], NORMAL[1:]
STOCHASTIC = [pytest.param(DDPM(), id="ddpm"), pytest.param(DDIM(eta=1.0), id="ddim-eta1")]
EVERY = [*STOCHASTIC, pytest.param(DDIM(), id="ddim")]


@pytest.fixture(params=[("float64", 1e-6), ("float32", 1e-5)], ids=lambda param: param[0])
def precision(request):
    """(dtype, relative tolerance), with 64-bit mode on only for float64."""
    dtype, tolerance = request.param
    with jax.enable_x64(dtype == "float64"):
        yield jnp.dtype(dtype), tolerance


def with_steps(sampler, steps):
    return dataclasses.replace(sampler, steps=steps)


def step_noise(i):
    return NOISE[i]


def golden_denoiser(x, t):
    s = t[:, None, None, None].astype(x.dtype) / 1000
    epsilon = jnp.tanh(0.8 * x) * (0.5 + s) + 0.1 * jnp.sin(3 * x)
    return jnp.concatenate([epsilon, jnp.sin(2 * x + s)], axis=-1)


def perfect_denoiser(diffusion, mean, std):
    """E[ε | x_t] for data N(mean(t), std²), without a variance."""
    alpha_bar = diffusion.alphas_cumprod
    signal, gain = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar) / (alpha_bar * std**2 + 1 - alpha_bar)

    def denoiser(x, t):
        residual = x - (jnp.float32(signal)[t] * mean(t))[:, None, None, None]
        return jnp.float32(gain)[t][:, None, None, None] * residual

    return denoiser


@pytest.mark.parametrize(
    "name, sampler",
    [
        ("ddpm20", DDPM(steps=20)),
        ("ddpm20_clip", DDPM(steps=20, clip=True)),
        ("ddim20_eta0.0", DDIM(steps="ddim20")),
        ("ddim20_eta0.5", DDIM(steps="ddim20", eta=0.5)),
    ],
)
def test_samplers_match_golden(name, sampler, precision):
    dtype, tolerance = precision
    z = jnp.asarray(np.moveaxis(GOLDEN["ddpm20/z"], 2, -1), dtype)
    sample = sampler(GaussianDiffusion(), golden_denoiser, z[0], lambda i: z[1 + i])
    expected = np.moveaxis(GOLDEN[f"{name}/sample"], 1, -1)
    assert sample.dtype == dtype
    assert np.sqrt(np.mean((sample - expected) ** 2) / np.mean(expected**2)) < tolerance


@pytest.mark.parametrize(
    "sampler, visited",
    [
        (DDPM(steps=4), [999, 666, 333, 0]),
        (DDIM(steps=4), [999, 666, 333, 0]),
        (DDPM(steps="2,1"), [500, 499, 0]),
        (DDIM(steps="ddim4"), [750, 500, 250, 0]),
    ],
)
def test_samplers_visit_exactly_the_expected_timesteps(sampler, visited):
    # A denoiser certain that x_0 is its timestep / 1000: the predicted x_0 shows which timestep it was given,
    # and is right only if the sampler's own tables belong to that timestep.
    diffusion = GaussianDiffusion(learn_sigma=False)
    denoiser = perfect_denoiser(diffusion, mean=lambda t: t / 1000, std=0)
    sample, trajectory = sampler(diffusion, denoiser, X_T, step_noise, return_trajectory=True)
    assert trajectory.shape == (len(visited), *X_T.shape)
    for predicted, timestep in zip(trajectory, visited, strict=True):
        np.testing.assert_allclose(predicted, timestep / 1000, atol=1e-4)
    np.testing.assert_allclose(sample, trajectory[-1], atol=1e-6)


def test_without_steps_every_timestep_is_visited():
    diffusion = GaussianDiffusion(num_steps=21, learn_sigma=False)
    denoiser = perfect_denoiser(diffusion, mean=lambda t: t / 1000, std=0)
    _, trajectory = DDPM()(diffusion, denoiser, X_T, step_noise, return_trajectory=True)
    np.testing.assert_allclose(trajectory[:, 0, 0, 0, 0], np.arange(21)[::-1] / 1000, atol=4e-4)


@pytest.mark.parametrize("sampler", EVERY)
def test_a_point_mass_is_recovered(sampler):
    diffusion = GaussianDiffusion(learn_sigma=False)
    denoiser = perfect_denoiser(diffusion, mean=lambda t: MEAN, std=0)
    sample = with_steps(sampler, 7)(diffusion, denoiser, X_T, step_noise)
    np.testing.assert_allclose(sample, MEAN, atol=1e-5)


def test_ddim_follows_the_probability_flow_of_gaussian_data():
    # The flow maps x_T's distance from its mean to x_0's in the ratio of the two standard deviations.
    diffusion = GaussianDiffusion(learn_sigma=False)
    denoiser = perfect_denoiser(diffusion, mean=lambda t: MEAN, std=STD)
    alpha_bar = diffusion.alphas_cumprod[-1]
    expected = MEAN + STD * (X_T - np.sqrt(alpha_bar) * MEAN) / np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    np.testing.assert_allclose(DDIM()(diffusion, denoiser, X_T, no_noise), expected, atol=0.01)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_stochastic_samplers_reproduce_the_moments_of_gaussian_data(sampler):
    diffusion = GaussianDiffusion(learn_sigma=False)
    denoiser = perfect_denoiser(diffusion, mean=lambda t: MEAN, std=STD)

    def noise(i):
        return jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (4096, 1, 1, 1))

    sample = sampler(diffusion, denoiser, noise(1000), noise)
    # Standard errors are 0.3/√4096 = 0.005 of the mean and 1.1 % of the deviation.
    np.testing.assert_allclose(sample.mean(), MEAN, atol=0.02)
    np.testing.assert_allclose(sample.std(), STD, rtol=0.05)


def test_ddim_with_eta_one_is_ddpm_with_the_posterior_variance():
    diffusion = GaussianDiffusion(learn_sigma=False, fixed_variance="small")

    def denoiser(x, t):
        return golden_denoiser(x, t)[..., : x.shape[-1]]

    stochastic = DDIM(steps=10, eta=1.0, clip=True)(diffusion, denoiser, X_T, step_noise)
    ancestral = DDPM(steps=10, clip=True)(diffusion, denoiser, X_T, step_noise)
    np.testing.assert_allclose(stochastic, ancestral, atol=1e-5)


def test_ddim_without_eta_never_draws_noise():
    sample = DDIM(steps=3)(GaussianDiffusion(), golden_denoiser, X_T, no_noise)
    assert np.isfinite(sample).all()


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_every_step_but_the_last_adds_noise(sampler):
    sampler = dataclasses.replace(sampler, steps=5, clip=True)

    @jax.jit
    def sample(noise):
        return sampler(GaussianDiffusion(), golden_denoiser, X_T, lambda i: noise[i])

    reference = sample(NOISE[:5])
    np.testing.assert_array_equal(sample(NOISE[:5].at[4].set(1e6)), reference)
    assert not np.allclose(sample(NOISE[:5].at[3].add(1.0)), reference)


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_an_image_depends_on_its_batch_by_rounding_only(sampler):
    # Not bit for bit, because XLA on a CPU vectorizes elementwise functions differently for different sizes.
    sampler = dataclasses.replace(sampler, steps=5, clip=True)

    @jax.jit
    def sample(images):
        def noise(i):
            return NORMAL[:, 0][images + i]

        return sampler(GaussianDiffusion(), golden_denoiser, noise(9), noise)

    together = sample(jnp.arange(4))
    np.testing.assert_allclose(together[1:3], sample(jnp.arange(1, 3)), atol=1e-5)
    np.testing.assert_allclose(together[3:], sample(jnp.array([3])), atol=1e-5)


@pytest.mark.parametrize("sampler", EVERY)
def test_the_program_is_one_scan_for_any_number_of_steps(sampler):
    def program(steps):
        run = with_steps(sampler, steps)
        return jax.make_jaxpr(lambda x: run(GaussianDiffusion(), golden_denoiser, x, step_noise))(X_T)

    short, long = program(10), program(500)
    assert [eqn.params["length"] for eqn in long.eqns if eqn.primitive.name == "scan"] == [500]
    assert len(str(long)) < 1.1 * len(str(short))


@pytest.mark.parametrize("sampler", EVERY)
def test_float32_images_stay_float32_beside_wider_noise(sampler):
    with jax.enable_x64(True):
        noise = NOISE.astype(jnp.float64)
        sampler, process = with_steps(sampler, 3), GaussianDiffusion()
        sample, trajectory = jax.eval_shape(
            lambda x: sampler(process, golden_denoiser, x, lambda i: noise[i], return_trajectory=True), X_T
        )
    assert noise.dtype == jnp.float64
    assert sample.dtype == trajectory.dtype == jnp.float32


@pytest.mark.parametrize("sampler", EVERY)
def test_a_sampler_compares_hashes_and_pickles_by_its_options(sampler):
    other = with_steps(sampler, 5)
    assert pickle.loads(pickle.dumps(other)) == other == with_steps(sampler, 5) != sampler
    assert len({sampler, other, with_steps(sampler, 5)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        other.steps = 6


def test_equal_samplers_share_one_compiled_program():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def sample(sampler, x):
        traces.append(sampler)
        return sampler(GaussianDiffusion(), golden_denoiser, x, step_noise)

    for steps in (3, 3, 2):
        sample(DDIM(steps=steps), X_T)
    assert traces == [DDIM(steps=3), DDIM(steps=2)]


def test_samplers_are_made_by_name_with_their_options():
    assert {name: type(make_sampler(name)) for name in SAMPLERS} == SAMPLERS
    assert make_sampler("ddim", steps=20, clip=True, eta=0.5) == DDIM(steps=20, clip=True, eta=0.5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dimm", {}, r"^unknown sampler: got 'dimm'; expected one of ddpm, ddim.*; did you mean 'ddim'\?$"),
        ("no such", {}, "^unknown sampler: got 'no such'; expected one of ddpm, ddim"),
        ("ddpm", {"eta": 0.5}, "^unknown option of sampler 'ddpm': got 'eta'; expected one of steps, clip$"),
        ("ddim", {"etta": 0.5}, "got 'etta'; expected one of steps, clip, eta; did you mean 'eta'"),
        ("ddim", {"eta": -0.1}, "^eta out of range: got -0.1; expected 0 … 1$"),
        ("ddim", {"eta": 1.5}, "^eta out of range: got 1.5; expected 0 … 1$"),
    ],
)
def test_invalid_names_and_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(name, **options)


def test_steps_that_the_process_does_not_have_are_named_before_anything_runs():
    DDIM(steps=1000).check(GaussianDiffusion())
    with pytest.raises(ValueError, match="invalid steps: got 1001; expected 1 … 1000"):
        DDIM(steps=1001).check(GaussianDiffusion())
