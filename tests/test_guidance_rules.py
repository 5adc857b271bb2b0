"""Guidance rules on Gaussian data, whose guided flow is known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_flow import Interior, denoiser, float64, flow, no_noise, start  # noqa: F401 (float64 is an autouse fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax.diffusion import FlowMatching, GaussianDiffusion, Guidance, make_rule
from dig_jax.diffusion.guidance import APG, GUIDED, RULES, ZERO, CFGZero, ClassifierFree, null_pair
from dig_jax.diffusion.samplers import DDIM, DPMpp2M, Heun

CLASS, NULL, SCALE = 0.2, -0.4, 2.5
X = np.random.default_rng(0).standard_normal((3, 2, 4, 4))
T = np.array([100.0, 500.0, 900.0])


def gaussian_pair(process, strong=CLASS, weak=NULL):
    """The denoiser of a class, and both denoisers."""
    plain, other = denoiser(process, strong), denoiser(process, weak)
    return plain, lambda x, t: (plain(x, t), other(x, t))


def guided(guidance, process, scale=SCALE, **means):
    return guidance(*gaussian_pair(process, **means), scale, process)


@pytest.mark.parametrize(
    ("rule", "mean"),
    [
        (make_rule("classifier_free"), NULL + SCALE * (CLASS - NULL)),
        (make_rule("autoguidance"), NULL + SCALE * (CLASS - NULL)),
        (make_rule("perturbed"), NULL + SCALE * (CLASS - NULL)),
        (APG(momentum=0.0, eta=1.0), NULL + SCALE * (CLASS - NULL)),
        # In images of one pixel, everything lies along the prediction.
        (APG(momentum=0.0, eta=0.0), CLASS),
        (APG(momentum=0.0, eta=0.5), CLASS + (SCALE - 1) * 0.5 * (CLASS - NULL)),
        (CFGZero(zero_init=0.0), CLASS),
    ],
    ids=str,
)
def test_each_rule_follows_its_flow_on_gaussian_data(rule, mean):
    process, x = Interior(), start(shape=(16, 1, 1, 1))
    drawn = DPMpp2M(steps=200)(process, guided(Guidance(rule=rule), process), x, no_noise)
    np.testing.assert_allclose(drawn, flow(process.path, x, 0.98, 0.02, mean=mean), atol=2e-3)


def test_an_interval_switches_the_mean_at_its_ends():
    process, steps = Interior(), 384  # 0.74 and 0.26 are knots
    drawn = DDIM(steps=steps)(process, guided(Guidance(interval=(0.26, 0.74)), process), start(), no_noise)
    x = flow(process.path, start(), 0.98, 0.74, mean=CLASS)
    x = flow(process.path, x, 0.74, 0.26, mean=NULL + SCALE * (CLASS - NULL))
    expected = flow(process.path, x, 0.26, 0.02, mean=CLASS)
    np.testing.assert_allclose(drawn, expected, atol=1e-2)
    assert np.abs(expected - flow(process.path, start(), 0.98, 0.02, mean=CLASS)).min() > 0.1


def counted(process, guidance, sampler):
    """The times at which the first and both denoisers are evaluated."""
    seen = {"plain": [], "pair": []}
    plain, pair = gaussian_pair(process)

    def noted(name, function):
        def call(x, t):
            jax.debug.callback(lambda t: seen[name].append(round(float(t[0]) / 1000, 6)), t, ordered=True)
            return function(x, t)

        return call

    jax.block_until_ready(
        sampler(
            process, guidance(noted("plain", plain), noted("pair", pair), SCALE, process), start(), no_noise
        )
    )
    jax.effects_barrier()
    return seen


def test_the_weaker_model_is_evaluated_in_the_interval_only_ends_included():
    guidance, sampler = Guidance(interval=(0.2, 0.7)), DDIM(steps=10)
    seen = counted(FlowMatching(), guidance, sampler)
    np.testing.assert_allclose(seen["pair"], [0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
    np.testing.assert_allclose(seen["plain"], [1.0, 0.9, 0.8, 0.1])
    kinds = guidance.kinds(sampler.fractions(FlowMatching()))
    np.testing.assert_array_equal(kinds, [1, 1, 1, 2, 2, 2, 2, 2, 2, 1])


def test_cfg_zero_evaluates_nothing_in_its_first_fraction():
    seen = counted(FlowMatching(), Guidance(rule=CFGZero(zero_init=0.2)), DDIM(steps=10))
    assert seen == {"plain": [], "pair": pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])}


def test_steps_that_would_all_have_zero_velocity_are_refused():
    with pytest.raises(ValueError, match="invalid zero_init=0.04 for 1 evaluations"):
        Guidance(rule=CFGZero()).kinds(DDIM(steps=1).fractions(FlowMatching()))
    assert Guidance(rule=CFGZero()).kinds(DDIM(steps=2).fractions(FlowMatching())).tolist() == [ZERO, GUIDED]


@pytest.mark.parametrize("prediction", ["velocity", "x", "noise", "v"])
def test_the_velocity_is_zero_in_the_first_fraction_of_cfg_zero(prediction):
    process = FlowMatching("trigonometric", prediction)
    denoise = guided(Guidance(rule=CFGZero(zero_init=0.5)), process).denoisers[0]
    output = denoise(jnp.asarray(X), jnp.asarray(T))
    level = process.level(jnp.asarray(T) / 1000, jnp.asarray(X))
    x0 = process.predict_image(output, jnp.asarray(X), jnp.asarray(T) / 1000)
    noise = (X - level.alpha * x0) / level.sigma
    np.testing.assert_allclose(level.alpha_dot * x0 + level.sigma_dot * noise, 0, atol=1e-10)


def combined(rule, strong, weak, scale=SCALE):
    return rule.combine(jnp.asarray(strong), jnp.asarray(weak), scale, None)[0]


@given(seed=st.integers(0, 2**31), scale=st.floats(0, 10))
@settings(max_examples=20)
def test_cfg_zero_is_classifier_free_where_the_weaker_velocity_fits(seed, scale):
    """⟨s, u⟩ = |u|² means that the best factor of u is 1: s = u plus anything orthogonal to u."""
    u, across = np.random.default_rng(seed).standard_normal((2, *X.shape))
    across -= inner(across, u) / inner(u, u) * u
    both = [combined(rule, u + across, u, scale) for rule in (CFGZero(), ClassifierFree())]
    np.testing.assert_allclose(*both, atol=1e-7)


def inner(a, b):
    return np.sum(a * b, axis=(1, 2, 3), keepdims=True)


def test_apg_guides_across_the_prediction_within_its_cap():
    s, u = np.random.default_rng(1).standard_normal((2, *X.shape))
    across = combined(APG(momentum=0.0), s, u) - s
    np.testing.assert_allclose(inner(across, s), 0, atol=1e-6)
    difference = s - u
    np.testing.assert_allclose(across, (SCALE - 1) * (difference - inner(difference, s) / inner(s, s) * s))
    capped = combined(APG(momentum=0.0, eta=1.0, norm_cap=2.0), s, u, 2.0) - s
    np.testing.assert_allclose(np.sqrt(inner(capped, capped)), 2.0)
    loose = combined(APG(momentum=0.0, eta=1.0, norm_cap=1e3), s, u, 2.0) - s
    np.testing.assert_allclose(loose, difference)


def test_the_momentum_of_apg_runs_through_all_evaluations_of_a_sampler():
    """Against a loop in NumPy: DDIM on the linear path with the differences of earlier evaluations."""
    process, rule = FlowMatching(), APG(momentum=-0.5, eta=0.3, norm_cap=1.0)
    drawn = DDIM(steps=6)(process, guided(Guidance(rule=rule), process), start(), no_noise)
    x, memory = np.asarray(start()), 0.0
    for t, after in zip(np.linspace(1, 0, 7), np.linspace(1, 0, 7)[1:], strict=False):
        now = jnp.full(4, 1000 * t)
        s, u = (np.asarray(x - t * denoiser(process, mean)(x, now)) for mean in (CLASS, NULL))
        memory = s - u - 0.5 * memory
        difference = memory * np.minimum(1, 1 / np.sqrt(inner(memory, memory)))
        along = inner(difference, s) / inner(s, s) * s
        image = s + (SCALE - 1) * (difference - along + 0.3 * along)
        x = after / t * x + (1 - after / t) * image
    np.testing.assert_allclose(drawn, x, atol=1e-6)


def of_pair(guidance, process, outputs, x, t):
    """The guided output for given outputs of both denoisers."""
    return guidance(lambda x, t: outputs[0], lambda x, t: tuple(outputs), SCALE, process)(x, t)


@pytest.mark.parametrize(
    "rule", [APG(momentum=0.0, norm_cap=1.0), CFGZero(zero_init=0.0)], ids=["apg", "cfg_zero"]
)
def test_a_rule_does_not_depend_on_what_the_network_predicts(rule):
    rng = np.random.default_rng(2)
    s, u, x, t = *rng.standard_normal((2, *X.shape)), jnp.asarray(X), jnp.asarray(T)
    for path in ("linear", "vp"):
        images = []
        for prediction in ("velocity", "x", "noise", "v"):
            process = FlowMatching(path, prediction)
            level = process.level(t / 1000, x)
            outputs = [
                process.targets(jnp.asarray(i), (x - level.alpha * i) / level.sigma, t / 1000) for i in (s, u)
            ]
            out = of_pair(Guidance(rule=rule), process, outputs, x, t)
            images.append(process.predict_image(out, x, t / 1000))
        for image in images[1:]:
            np.testing.assert_allclose(image, images[0], rtol=1e-6, atol=1e-6)
        if isinstance(rule, APG):
            np.testing.assert_allclose(images[0], combined(rule, s, u), atol=1e-6)


def test_apg_acts_on_the_images_of_ddpm():
    process, t = GaussianDiffusion(learn_sigma=True), jnp.array([10, 500, 999])
    s, u = np.random.default_rng(3).standard_normal((2, *X.shape))
    x, rule = jnp.asarray(X), APG(momentum=0.0)
    outputs = [
        jnp.concatenate([process.predict_epsilon(x, t, jnp.asarray(i)), v * jnp.ones_like(x)], axis=-1)
        for i, v in ((s, 0.25), (u, -1.0))
    ]
    output = of_pair(Guidance(rule=rule), process, outputs, x, t)
    np.testing.assert_allclose(process.predict_image(output, x, t), combined(rule, s, u), atol=1e-6)
    np.testing.assert_array_equal(output[..., 4:], 0.25)


def test_cfg_zero_refuses_ddpm():
    with pytest.raises(
        ValueError, match="unsupported process for CFGZero: got GaussianDiffusion; expected Flow"
    ):
        Guidance(rule=CFGZero()).check(GaussianDiffusion())


def test_rescaling_restores_the_deviation_of_each_image():
    process = FlowMatching()
    plain, pair = (lambda x, t: jnp.sin(x)), (lambda x, t: (jnp.sin(x), jnp.cos(2 * x)))
    x, t = jnp.asarray(X), jnp.asarray(T)
    free = Guidance()(plain, pair, SCALE, process)(x, t)
    for phi in (0.3, 1.0):
        out = Guidance(rescale=phi)(plain, pair, SCALE, process)(x, t)
        expected = phi * np.std(np.sin(X), (1, 2, 3)) + (1 - phi) * np.std(free, (1, 2, 3))
        np.testing.assert_allclose(np.std(out, (1, 2, 3)), expected)


@pytest.mark.parametrize("name", RULES)
def test_an_image_does_not_depend_on_its_batch(name):
    process = FlowMatching()
    guidance = Guidance(rule=make_rule(name), rescale=0.5, interval=(0.1, 0.9))
    means, x = jnp.array([0.2, 0.5, -0.3, 0.0]), start(shape=(4, 2, 2, 3))

    @jax.jit
    def draw(x, means):
        plain, pair = gaussian_pair(process, means[:, None, None, None])
        return Heun(steps=5)(process, guidance(plain, pair, SCALE, process), x, no_noise)

    whole = draw(x, means)
    for i in range(4):
        np.testing.assert_allclose(draw(x[i : i + 1], means[i : i + 1])[0], whole[i], rtol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_a_weight_of_one_is_the_stronger_prediction(name):
    rng = np.random.default_rng(4)
    s, u = rng.standard_normal((2, *X.shape))
    np.testing.assert_allclose(combined(make_rule(name), s, u, 1.0), s, atol=1e-12)


def test_null_labels_are_the_weaker_half_of_one_batch():
    def labeled(x, t, y):
        return x + y[:, None, None, None]

    strong, weak = null_pair(labeled, jnp.array([1, 2, 3]), 7)(jnp.asarray(X), jnp.asarray(T))
    np.testing.assert_allclose(strong, X + np.array([1, 2, 3])[:, None, None, None])
    np.testing.assert_allclose(weak, X + 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_rule("apgg"), "unknown guidance: got 'apgg'; expected one of .*did you mean 'apg'"),
        (
            lambda: make_rule("apg", moment=0.5),
            "unknown option of guidance 'apg': got 'moment'; expected one of .*did you mean 'momentum'",
        ),
        (
            lambda: make_rule("apg", momentum="x"),
            "invalid momentum of guidance 'apg': got 'x'; .* float",
        ),
        (
            lambda: make_rule("classifier_free", zero_init=0.1),
            "unknown option of guidance 'classifier_free': got 'zero_init'; expected no options",
        ),
        (lambda: APG(momentum=1.0), "invalid momentum: got 1.0; expected a number between -1 and 1"),
        (lambda: APG(norm_cap=0.0), "invalid norm_cap: got 0.0; expected a positive number or None"),
        (lambda: CFGZero(zero_init=1.0), "invalid zero_init: got 1.0; expected a number from 0"),
        (lambda: make_rule("perturbed", blocks=[-1]), r"invalid blocks: got \[-1\]; expected indices"),
        (
            lambda: Guidance(interval=(0.5, 0.5)),
            "invalid interval: got .*two increasing numbers",
        ),
        (lambda: Guidance(rescale=2.0), "invalid rescale: got 2.0; expected a number between 0 and 1"),
    ],
)
def test_invalid_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
