import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax.diffusion import DDIM, GaussianDiffusion, classifier_free

NULL = 10
LABELS = jnp.array([3, 0, 7])
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 4, 4)), jnp.float32)
T = jnp.array([0, 500, 999])


def labelled(x, t, y):
    """Noise and variance that depend on image, timestep and label, differently per channel."""
    y, t = y[:, None, None, None], t[:, None, None, None] / 1000
    channel = jnp.arange(x.shape[-1])
    return jnp.concatenate([jnp.sin(x + y * (1 + channel)) + t, jnp.cos(x * (y + 1) - t)], axis=-1)


GUIDED = jax.jit(lambda scale: classifier_free(labelled, LABELS, NULL, scale)(X, T))
COND = labelled(X, T, LABELS)
UNCOND = labelled(X, T, jnp.full_like(LABELS, NULL))


@given(scale=st.floats(0, 10, width=32))
@settings(max_examples=20)
def test_noise_is_extrapolated_and_variance_is_conditional(scale):
    epsilon, variance = jnp.split(GUIDED(scale), 2, axis=-1)
    expected = UNCOND[..., :4] + scale * (COND[..., :4] - UNCOND[..., :4])
    np.testing.assert_allclose(epsilon, expected, atol=1e-5)
    np.testing.assert_allclose(variance, COND[..., 4:], atol=1e-5)


def test_scale_zero_is_the_unconditional_noise():
    np.testing.assert_allclose(GUIDED(0.0)[..., :4], UNCOND[..., :4], atol=1e-6)


def test_guidance_of_three_channels_leaves_the_rest_conditional():
    output = classifier_free(labelled, LABELS, NULL, 4.0, channels=3)(X, T)
    every = classifier_free(labelled, LABELS, NULL, 4.0)(X, T)
    np.testing.assert_array_equal(output[..., :3], every[..., :3])
    np.testing.assert_array_equal(output[..., 3:], COND[..., 3:])
    assert not np.allclose(output[..., 3], every[..., 3])


@pytest.mark.parametrize("scale, batch", [(1, 3), (1.0, 3), (1.5, 6)])
def test_one_batch_and_at_scale_one_only_its_conditional_half(scale, batch):
    seen = []

    def recorded(x, t, y):
        seen.append((x.shape[0], t.shape[0], y.shape[0]))
        return labelled(x, t, y)

    classifier_free(recorded, LABELS, NULL, scale)(X, T)
    assert seen == [(batch,) * 3]


def test_a_traced_scale_of_one_is_the_conditional_prediction():
    np.testing.assert_allclose(GUIDED(1.0), COND, atol=1e-6)


def test_each_image_can_have_its_own_scale():
    scales = [1.0, 2.5, 0.0]
    output = classifier_free(labelled, LABELS, NULL, jnp.array(scales))(X, T)
    for image, scale in enumerate(scales):
        np.testing.assert_allclose(output[image], GUIDED(scale)[image], atol=1e-6)


def test_all_channels_of_a_denoiser_without_variance_are_guided():
    def noise_only(x, t, y):
        return labelled(x, t, y)[..., :4]

    output = classifier_free(noise_only, LABELS, NULL, 2.0)(X, T)
    np.testing.assert_allclose(output, 2 * COND[..., :4] - UNCOND[..., :4], atol=1e-6)


def test_guided_sampling_moves_a_gaussian_class_beyond_its_mean():
    # Class c is a point mass at m_c, the null class one at 0: every step predicts x_0 = scale · m_c.
    diffusion = GaussianDiffusion(learn_sigma=False)
    means = jnp.zeros(NULL + 1).at[LABELS].set(jnp.array([-0.5, 0.2, 1.0]))

    def denoise(x, t, y):
        return diffusion.predict_epsilon(x, t, jnp.broadcast_to(means[y][:, None, None, None], x.shape))

    guided = classifier_free(denoise, LABELS, NULL, 1.5)
    sample = DDIM(steps=5)(diffusion, guided, X, jnp.zeros_like)
    expected = np.broadcast_to(1.5 * means[LABELS][:, None, None, None], X.shape)
    np.testing.assert_allclose(sample, expected, atol=1e-5)


@pytest.mark.parametrize("channels", [0, 5])
def test_channels_out_of_range_are_named(channels):
    with pytest.raises(ValueError, match=f"channels out of range: got {channels}; expected 1 … 4 or None"):
        classifier_free(labelled, LABELS, NULL, 2.0, channels=channels)(X, T)


def test_a_scale_with_an_invalid_shape_is_named():
    with pytest.raises(
        ValueError, match=r"invalid shape of scale: got \(2,\); expected \(\) or one value per label, \(3,\)"
    ):
        classifier_free(labelled, LABELS, NULL, jnp.array([1.0, 2.0]))
