"""Flow matching: targets, predictions, weights, and the two processes through training and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_flow import denoiser, start

from dig_jax.components import Components
from dig_jax.diffusion import FlowMatching, GaussianDiffusion, Path, Process, Times
from dig_jax.diffusion.flow_matching import TRAINED, WEIGHTS
from dig_jax.diffusion.path import PATHS
from dig_jax.errors import ConfigError
from dig_jax.testing import tiny_settings

X0, NOISE = start(1, (6, 2, 2, 3)).astype(jnp.float32), start(2, (6, 2, 2, 3)).astype(jnp.float32)
T = jnp.array([0.01, 0.2, 0.4, 0.6, 0.8, 0.99])
EVERY = [
    FlowMatching(Path(path), prediction, weight=weight)
    for path in PATHS
    for prediction in TRAINED
    for weight in WEIGHTS
]


@pytest.fixture(params=EVERY, ids=lambda p: f"{p.path.name}-{p.prediction}-{p.weight}")
def process(request):
    return request.param


def test_the_targets_minimize_the_loss_and_give_the_image_back(process):
    x_t, targets = process.corrupt(X0, NOISE, T), process.targets(X0, NOISE, T)
    terms = process.loss(targets, x0=X0, noise=NOISE, x_t=x_t, times=T)
    np.testing.assert_array_equal(terms["loss"], 0)
    off = process.loss(targets + 0.1, x0=X0, noise=NOISE, x_t=x_t, times=T)
    np.testing.assert_allclose(off["mse"], 0.01, rtol=1e-3)
    np.testing.assert_allclose(off["loss"], process.weight_at(T) * off["mse"], rtol=1e-6)
    restored = process.predict_image(targets, x_t, T)
    # Noise predictions lose α's digits near t = 1.
    np.testing.assert_allclose(restored, X0, atol=1e-3 if process.prediction == "noise" else 1e-4)


def test_losses_stay_finite_at_both_ends(process):
    ends = process.times_at(jnp.linspace(0, 1, len(T)))
    x_t = process.corrupt(X0, NOISE, ends)
    for value in process.loss(jnp.zeros_like(X0), x0=X0, noise=NOISE, x_t=x_t, times=ends).values():
        assert np.isfinite(value).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", TRAINED)
def test_the_velocity_weight_is_the_error_of_the_velocity(path, prediction):
    t = jnp.array([0.1, 0.3, 0.5, 0.7])  # at the ends, divisors are limited
    images, noise, output = X0[1:5], NOISE[1:5], start(3, (4, 2, 2, 3)).astype(jnp.float32)
    process = FlowMatching(Path(path), prediction, weight="velocity")
    x_t = process.corrupt(images, noise, t)
    loss = process.loss(output, x0=images, noise=noise, x_t=x_t, times=t)["loss"]
    level = process.level(t, x_t)
    x = process.predict_image(output, x_t, t)
    velocity = level.alpha_dot * x + level.sigma_dot * (x_t - level.alpha * x) / level.sigma
    true = FlowMatching(Path(path)).targets(images, noise, t)
    np.testing.assert_allclose(loss, jnp.mean((velocity - true) ** 2, axis=(1, 2, 3)), rtol=1e-3)


def test_x_prediction_with_the_velocity_weight_is_jit():
    t = jnp.array([0.0, 0.01, 0.05, 0.2, 0.7, 1.0])
    process, output = FlowMatching(prediction="x", weight="velocity"), NOISE**2
    x_t = process.corrupt(X0, NOISE, t)

    def jit(output):
        clamped = jnp.maximum(t, 0.05)[:, None, None, None]
        return jnp.mean(((x_t - output) / clamped - (x_t - X0) / clamped) ** 2, axis=(1, 2, 3))

    def ours(output):
        return process.loss(output, x0=X0, noise=NOISE, x_t=x_t, times=t)["loss"]

    np.testing.assert_allclose(ours(output), jit(output), rtol=1e-5)
    gradients = (jax.grad(lambda output, f=f: f(output).sum())(output) for f in (ours, jit))
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_min_snr_weights_are_those_of_the_paper_and_one_loss_of_x(path):
    level = Path(path).at(T)
    snr = level.snr
    weights = {kind: FlowMatching(Path(path), kind, weight="min_snr").weight_at(T) for kind in TRAINED}
    np.testing.assert_allclose(weights["x"], np.minimum(snr, 5), rtol=1e-4)
    np.testing.assert_allclose(weights["noise"], np.minimum(snr, 5) / snr, rtol=1e-4)
    if path != "linear":  # α² + σ² = 1
        np.testing.assert_allclose(weights["v"], np.minimum(snr, 5) / (snr + 1), rtol=1e-4)
    # An error of the prediction gives an error of x, whose weighted square is the same for every prediction.
    for kind, weight in weights.items():
        process = FlowMatching(Path(path), kind)
        x_t, targets = process.corrupt(X0, NOISE, T), process.targets(X0, NOISE, T)
        moved = process.predict_image(targets + 0.1, x_t, T) - process.predict_image(targets, x_t, T)
        error = jnp.mean(moved**2, axis=(1, 2, 3))
        np.testing.assert_allclose(weight * 0.01, np.minimum(snr, 5) * error, rtol=0.02, atol=1e-9)


def test_min_snr_weights_the_noise_error_of_ddpm_and_nothing_else():
    t = jnp.array([0, 100, 300, 500, 700, 999])
    plain, weighted = GaussianDiffusion(), GaussianDiffusion(weight="min_snr")
    output = jnp.concatenate([NOISE**2, X0], axis=-1)
    given = {"x0": X0, "noise": NOISE, "x_t": plain.corrupt(X0, NOISE, t), "times": t}
    before, after = plain.loss(output, **given), weighted.loss(output, **given)
    snr = plain.alphas_cumprod[t] / (1 - plain.alphas_cumprod[t])
    expected = np.minimum(snr, 5) / snr * before["mse"] + before["vb"]
    np.testing.assert_allclose(after["loss"], expected, rtol=1e-5)
    np.testing.assert_array_equal(before["loss"], before["mse"] + before["vb"])
    np.testing.assert_array_equal(after["mse"], before["mse"])
    assert Components(tiny_settings(diffusion__weight="min_snr")).diffusion == weighted


def test_the_exact_denoisers_of_all_predictions_agree_on_the_image():
    for path in PATHS:
        x_t = FlowMatching(Path(path)).corrupt(0.7 + 0.3 * X0, NOISE, T)
        images = [
            process.predict_image(denoiser(process)(x_t, process.timestep_input(T)), x_t, T)
            for process in (FlowMatching(Path(path), prediction) for prediction in TRAINED)
        ]
        for image in images[1:]:
            np.testing.assert_allclose(image, images[0], atol=1e-3)


def test_a_path_may_be_given_by_name():
    assert FlowMatching(path="vp") == FlowMatching(Path("vp"))
    assert hash(FlowMatching(path="vp")) == hash(FlowMatching(Path("vp")))
    assert FlowMatching(path="vp").path == Path("vp")


def test_further_channels_of_the_output_are_ignored():
    process = FlowMatching()
    x_t, wide = process.corrupt(X0, NOISE, T), jnp.concatenate([NOISE, X0], axis=-1)
    given = {"x0": X0, "noise": NOISE, "x_t": x_t, "times": T}
    np.testing.assert_array_equal(process.loss(wide, **given)["loss"], process.loss(NOISE, **given)["loss"])
    np.testing.assert_array_equal(process.predict_image(wide, x_t, T), process.predict_image(NOISE, x_t, T))


def test_clipping_limits_the_predicted_image():
    process = FlowMatching(prediction="x")
    image = process.predict_image(5 * NOISE, NOISE, T, clip=True)
    np.testing.assert_array_equal(image, np.clip(5 * NOISE, -1, 1))


def test_knots_are_the_shifted_times_from_noise_to_clean_images():
    process = FlowMatching(times=Times("logit_normal", shift=3.0))
    times, level = process.knots(4)
    np.testing.assert_allclose(times, [1, 0.9, 0.75, 0.5, 0])
    np.testing.assert_allclose([level.alpha, level.sigma], [1 - times, times])
    assert FlowMatching(prediction="noise").knots(4).times[0] == 0.999  # α = 0 hides the image at 1
    for steps in (0, "ddim50", None):
        with pytest.raises(ValueError, match="invalid steps: got .*; expected a positive integer"):
            process.knots(steps)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"process": "flow"}, FlowMatching()),
        (
            {
                "process": "flow",
                "path": "vp",
                "prediction": "x",
                "weight": "min_snr",
                "times": "logit_normal",
            },
            FlowMatching(Path("vp"), "x", Times("logit_normal"), "min_snr"),
        ),
        (
            {"process": "flow", "times": "logit_normal", "time_mean": 0.8, "time_std": 0.5},
            FlowMatching(times=Times("logit_normal", 0.8, 0.5)),
        ),
        (
            {"process": "flow", "time_low": 0.1, "time_high": 0.9},
            FlowMatching(times=Times(low=0.1, high=0.9)),
        ),
        # 4 × 4 × 1 = 16 dimensions: √(16/4096).
        ({"process": "flow", "time_shift": 0.0}, FlowMatching(times=Times(shift=0.0625))),
        ({"process": "flow", "time_shift": 2.0}, FlowMatching(times=Times(shift=2.0))),
    ],
)
def test_the_config_describes_the_process(fields, expected):
    process = Components(tiny_settings(**{f"diffusion__{name}": f for name, f in fields.items()})).diffusion
    assert process == expected
    assert isinstance(process, Process)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"process": "flaw"}, "invalid config.diffusion.process='flaw'; expected ddpm, flow or meanflow"),
        ({"prediction": "x"}, "config.diffusion: unsupported prediction of process=ddpm: got 'x'; expected"),
        (
            {"weight": "velocity"},
            "config.diffusion: invalid weight: got 'velocity'; expected one of none, min",
        ),
        (
            {"weight": "min_snr", "loss": "kl"},
            "config.diffusion: invalid weight: got 'min_snr'; expected one",
        ),
        ({"process": "flow", "path": "gvp"}, "config.diffusion: unknown path: got 'gvp'; expected one of"),
        ({"process": "flow", "prediction": "score"}, "config.diffusion: invalid prediction: got 'score'"),
        ({"process": "flow", "weight": "snr"}, "config.diffusion: invalid weight: got 'snr'"),
        ({"process": "flow", "times": "normal"}, "config.diffusion: unknown times: got 'normal'"),
        ({"process": "flow", "time_low": 1.0}, "config.diffusion: invalid time_low, time_high: got 1.0, 1.0"),
        (
            {"process": "flow", "times": "logit_normal", "time_std": 0.0},
            "config.diffusion: invalid time_std: got 0.0",
        ),
        (
            {"process": "flow", "time_mean": 0.8},
            "config.diffusion: unsupported time_mean of times=uniform: got 0.8; expected the default",
        ),
        ({"process": "flow", "loss": "kl"}, "unsupported loss of process=flow: got 'kl'; .* process=ddpm"),
        ({"process": "flow", "schedule": "cosine"}, "unsupported schedule of process=flow: got 'cosine'"),
    ],
)
def test_invalid_fields_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        _ = Components(tiny_settings(**{f"diffusion__{name}": f for name, f in fields.items()})).diffusion


def test_held_out_times_are_the_quantiles_of_the_training_times():
    process = FlowMatching(times=Times("logit_normal", 0.8, 0.8))
    drawn = process.sample_times(jax.random.split(jax.random.key(0), 4000))
    spread = process.times_at((jnp.arange(4000) + 0.5) / 4000)
    # Kolmogorov-Smirnov: 1.95/√4000 at the level 0.001.
    shares = np.searchsorted(np.sort(drawn), spread) / 4000
    assert np.abs(shares - (np.arange(4000) + 0.5) / 4000).max() < 1.95 / np.sqrt(4000)


def test_levels_are_equal_ranges_of_the_time():
    levels = FlowMatching().level_index(jnp.array([0.0, 0.24, 0.26, 0.5, 0.99, 1.0]), 4)
    np.testing.assert_array_equal(levels, [0, 0, 1, 2, 3, 3])
