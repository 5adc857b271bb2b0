"""The autoencoder compared to diffusers' golden values, and its own guarantees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_autoencoder import GOLDEN, write_autoencoder

from dig_jax.autoencoder import Autoencoder, AutoencoderArchitecture, load, to_uint8
from dig_jax.autoencoder.model import default_stripes

SMALL = AutoencoderArchitecture(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4)


@functools.cache
def golden():
    return dict(np.load(GOLDEN))


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


def relative_error(value, expected):
    return np.sqrt(np.square(value - expected).mean() / np.square(expected).mean())


@pytest.fixture(scope="module")
def golden_folder(tmp_path_factory):
    return write_autoencoder(tmp_path_factory.mktemp("vae"))


@functools.cache
def small(dtype=jnp.float32, **changes):
    """An autoencoder with random parameters, including biases and scales."""
    config, generator = dataclasses.replace(SMALL, **changes), np.random.default_rng(0)
    abstract = nnx.eval_shape(lambda: Autoencoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract)

    def draw(leaf):
        noise = generator.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(
            noise / np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 1 + 0.1 * noise
        )

    return nnx.merge(graphdef, jax.tree.map(draw, params))


def latents(height=6, width=4):
    """Latents of two images; tests share one size, and so compiled programs."""
    return jax.random.normal(jax.random.key(2), (2, height, width, 4))


def test_moments_are_those_of_diffusers(golden_folder):
    moments = load(golden_folder).encode(nhwc(golden()["image"]))
    mean, logvar = jnp.split(moments, 2, axis=-1)
    assert relative_error(mean, nhwc(golden()["mean"])) < 1e-5
    assert relative_error(logvar, nhwc(golden()["logvar"])) < 1e-5


@pytest.mark.parametrize("stripes", [1, 4])
def test_decoded_images_are_those_of_diffusers(golden_folder, stripes):
    autoencoder = load(golden_folder)
    scaled = nhwc(golden()["mean"]) * autoencoder.config.scaling_factor
    images = autoencoder.decode(scaled, stripes=stripes)
    assert relative_error(images, nhwc(golden()["decoded_mean"])) < 1e-5


def test_the_default_config_has_the_published_number_of_parameters():
    model = nnx.eval_shape(lambda: Autoencoder(AutoencoderArchitecture(), rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == 83_653_863


@pytest.mark.parametrize("stripes", [pytest.param(2, marks=pytest.mark.slow), 6])
def test_stripes_give_the_same_image(stripes):
    x = latents()
    whole = small().decode(x, stripes=1)
    assert whole.shape == (2, 24, 16, 3)
    np.testing.assert_allclose(small().decode(x, stripes=stripes), whole, atol=2e-5)


def test_attention_in_chunks_is_exact(monkeypatch):
    attention, x = (
        small().decoder.mid_block.attentions[0],
        jax.random.normal(jax.random.key(3), (2, 4, 6, 16)),
    )
    whole = attention(x)
    monkeypatch.setattr("dig_jax.autoencoder.layers.MAX_SCORES", 100)  # 4 of 24 queries at a time
    np.testing.assert_allclose(attention(x), whole, atol=1e-6)


@pytest.mark.parametrize(("size", "stripes"), [((128, 128), 1), ((256, 256), 128), ((129, 600), 129)])
def test_large_images_are_decoded_in_stripes_by_default(size, stripes):
    assert default_stripes(*size) == stripes


@pytest.mark.slow
def test_2048_pixels_are_decoded_in_less_than_6_gigabytes():
    """The compiler counts parameters, latents, image and temporaries in float32."""
    graphdef, params = nnx.split(
        nnx.eval_shape(lambda: Autoencoder(AutoencoderArchitecture(), rngs=nnx.Rngs(0)))
    )
    x = jax.ShapeDtypeStruct((1, 256, 256, 4), jnp.float32)
    decode = jax.jit(lambda params, x: nnx.merge(graphdef, params).decode(x), keep_unused=True)
    memory = decode.lower(params, x).compile().memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    assert memory.argument_size_in_bytes > 4 * 83_653_863
    assert total < 6e9


def test_bfloat16_is_close_and_keeps_parameters_and_results_in_float32():
    half, x = small(jnp.bfloat16), latents()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype(jnp.float32)}
    images = half.decode(x)
    assert images.dtype == jnp.float32
    assert 0 < relative_error(images, small().decode(x)) < 0.05
    np.testing.assert_allclose(
        half.decode(x, stripes=2), images, rtol=0.02, atol=0.05 * float(jnp.std(images))
    )
    moments = half.encode(images)
    assert moments.dtype == jnp.float32
    assert 0 < relative_error(moments, small().encode(images)) < 0.05


def test_pixels_and_floats_are_the_same_image():
    pixels = np.resize(np.arange(192, dtype=np.uint8), (2, 24, 16, 3))
    floats = (pixels / 255 - 0.5) / 0.5
    np.testing.assert_array_equal(to_uint8(floats.astype(np.float32)), pixels)
    moments = small().encode(pixels)
    np.testing.assert_allclose(moments, small().encode(floats.astype(np.float32)), atol=1e-5)
    overshot = jnp.array([-1.5, -1.0, 0.0, 1.0, 1.5])
    np.testing.assert_array_equal(to_uint8(overshot), [0, 0, 128, 255, 255])


def test_a_sample_is_mean_and_deviation_scaled_and_belongs_to_its_key():
    moments = jnp.concatenate([jnp.full((3, 8, 8, 4), 2.0), jnp.full((3, 8, 8, 4), -4.0)], axis=-1)
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = small().sample(moments, keys)
    np.testing.assert_allclose(small().mean(moments), 2 * 0.18215, rtol=1e-6)
    noise = jnp.stack([jax.random.normal(key, (8, 8, 4)) for key in keys])
    np.testing.assert_allclose(drawn, (2 + np.exp(-2) * noise) * 0.18215, rtol=1e-5)
    np.testing.assert_array_equal(small().sample(moments[1:2], keys[1:2])[0], drawn[1])


def test_decode_undoes_the_scaling_of_the_config():
    x = latents()
    np.testing.assert_allclose(
        small(scaling_factor=0.5).decode(x / 0.18215 * 0.5), small().decode(x), atol=1e-5
    )


def test_the_fingerprint_is_of_parameters_and_config_but_not_of_the_dtype(golden_folder):
    autoencoder = load(golden_folder)
    before = autoencoder.fingerprint()
    # Latent caches store it: if this fails, they are taken for those of a different autoencoder.
    assert before == "5e886f9838a11b899e269982f51915c229caa42229162a9552ec1ca9dc84d980"
    assert before == load(golden_folder, dtype=jnp.bfloat16).fingerprint()
    autoencoder.quant_conv.bias[...] = autoencoder.quant_conv.bias[...].at[0].add(1e-3)
    assert autoencoder.fingerprint() != before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: small().encode(np.zeros((1, 8, 10, 3), np.uint8)),
            "invalid images of 8×10 pixels; expected multiples of 4",
        ),
        (lambda: small().encode(np.zeros((1, 3, 8, 8), np.uint8)), "images with 8 channels|3×8 pixels"),
        (lambda: small().decode(latents()[..., :3]), "invalid latents with 3 channels; expected 4"),
        (lambda: small().decode(latents(), stripes=4), "invalid stripes=4; expected a divisor .* 6"),
        (lambda: small().decode(latents(), stripes=0), "stripes=0"),
        (lambda: AutoencoderArchitecture(block_out_channels=(10,)), "multiples of norm_num_groups=32"),
        (
            lambda: AutoencoderArchitecture(layers_per_block=10**9),
            "invalid layers_per_block=1000000000; expected 1 to 16",
        ),
        (lambda: AutoencoderArchitecture(scaling_factor=float("nan")), "scaling_factor=nan"),
    ],
)
def test_an_invalid_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_stripes_give_the_same_image_at_full_size_and_512_pixels():
    autoencoder = Autoencoder(AutoencoderArchitecture(), rngs=nnx.Rngs(0))
    x = latents(64, 64)
    whole = autoencoder.decode(x, stripes=1)
    error = jnp.abs(autoencoder.decode(x, stripes=16) - whole).max()
    assert error < 1e-4 * jnp.abs(whole).max()
