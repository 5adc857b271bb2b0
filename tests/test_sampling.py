import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dig_jax
from dig_jax import ConfigError, Sampler
from dig_jax.diffusion import SAMPLERS
from dig_jax.parallel import batch_sharding, state_sharding
from dig_jax.sampling.generate import generate, noise
from dig_jax.sampling.generation_spec import GenerationSpec
from dig_jax.sampling.sampler import to_pixels
from dig_jax.testing import (
    PlainComponents,
    PlainModel,
    mesh_of,
    random_params,
    tiny_components,
    tiny_settings,
    write_checkpoint,
)

STEPS = 3
SEEDS = [3, 1, 4, 15, 9]
FLOW_ONLY = {"euler_maruyama", "edm_heun", "dopri5", "meanflow"}


@functools.cache
def sampler(batch_size=8, **axes):
    components = tiny_components(sampling__steps=STEPS, sampling__batch_size=batch_size)
    mesh = mesh_of(**axes) if axes else None
    return Sampler(components, random_params(components), step=0, mesh=mesh)


@functools.cache
def plain_sampler():
    """Tests that draw `SEEDS` with it share one compiled program."""
    settings = tiny_settings(sampling__steps=STEPS, sampling__batch_size=8)
    return Sampler(PlainComponents(settings), {}, step=0)


def test_the_noise_of_an_image_depends_on_its_seed_and_the_step_alone():
    """Bit for bit, whatever the batch around it and however many devices there are."""
    draw = jax.jit(noise, static_argnums=2)
    seeds, shape = jnp.array([5, 0, 2**31 - 1, 7, 3, 4, 2, 1]), (4, 6, 3)
    whole = draw(seeds, jnp.int32(2), shape)
    np.testing.assert_array_equal(draw(seeds[3:4], jnp.int32(2), shape), whole[3:4])
    mesh = mesh_of(4)
    sharded = draw(jax.device_put(seeds, batch_sharding(mesh)), jnp.int32(2), shape)
    assert len(sharded.sharding.device_set) == 4
    np.testing.assert_array_equal(sharded, whole)
    assert len(np.unique(whole)) == whole.size
    assert not np.isin(draw(seeds, jnp.int32(3), shape), whole).any()


@pytest.mark.parametrize("other", [{"batch_size": 2}, {"data": 2, "fsdp": 2}], ids=str)
def test_images_do_not_depend_on_the_batch_size_or_on_devices(other):
    """Five images: at once, in three batches with the last one padded, and on four devices.

    A random network's images are out of range and are scaled, or all pixels would be black or white.
    """
    one, two = (drawer(seeds=SEEDS, return_latents=True) for drawer in (sampler(), sampler(**other)))
    assert one.shape == two.shape == (5, 4, 4, 1)
    scale = np.abs(one).max()
    pixels = to_pixels(one / scale).astype(int)
    assert len(np.unique(pixels)) > 50
    assert np.abs(pixels - to_pixels(two / scale)).max() <= 1


def test_sharded_parameters_are_gathered_once_and_not_at_every_step():
    components = tiny_components()
    mesh = mesh_of(data=1, fsdp=4)
    params = random_params(components)
    sharded = jax.device_put(params, state_sharding(params, mesh))
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    whole = Sampler(components, sharded, step=0, mesh=mesh).params
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(whole))


def test_another_seed_or_label_is_another_image():
    latents = sampler()([0, 0, 1, 1, 0], seeds=[3, 1, 3, 1, 3], return_latents=True)
    np.testing.assert_array_equal(latents[4], latents[0])
    assert len(np.unique(latents[:4].reshape(4, -1), axis=0)) == 4


def test_latents_are_the_images_before_rounding():
    latents = plain_sampler()(seeds=SEEDS, return_latents=True)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(to_pixels(latents), plain_sampler()(seeds=SEEDS))


def test_pixels_are_rounded_and_clipped():
    x = np.array([-1.5, -1, 0.9 / 127.5 - 1, 0, 1, 1.5])
    np.testing.assert_array_equal(to_pixels(x), [0, 0, 1, 128, 255, 255])


@pytest.mark.parametrize(
    ("labels", "seeds", "expected_labels", "expected_seeds"),
    [
        (None, None, [0], [0]),
        (None, 6, [1], [6]),
        (None, range(3, 7), [3, 4, 0, 1], [3, 4, 5, 6]),
        (1, None, [1], [0]),
        ([3, 3, 1], None, [3, 3, 1], [0, 1, 2]),
        (2, [8, 9], [2, 2], [8, 9]),
        (np.array([2, 3]), 8, [2, 3], [8, 8]),
    ],
)
def test_labels_and_seeds_have_defaults_and_broadcast(labels, seeds, expected_labels, expected_seeds):
    result = plain_sampler().resolve(labels, seeds)
    for numbers, expected in zip(result, (expected_labels, expected_seeds), strict=True):
        assert numbers.dtype == np.int32
        np.testing.assert_array_equal(numbers, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 5}, "label out of range: got 5; expected 0 … 4"),
        ({"labels": [0, -1]}, "label out of range: got -1"),
        ({"seeds": -1}, "seed out of range: got -1; expected 0 … 2147483647"),
        ({"seeds": 2**31}, "seed out of range: got 2147483648"),
        ({"seeds": np.array([0.5])}, r"invalid seeds: got \[0.5\]; expected one or more integers"),
        ({"labels": []}, r"invalid labels: got \[\]; expected one"),
        ({"labels": np.array([[1]])}, "invalid labels: got .*expected one or more integers"),
        ({"labels": [0, 1], "seeds": [0, 1, 2]}, "numbers of labels and seeds differ: got 2 and 3"),
        ({"sampler": "ddmp"}, "unknown sampler: got 'ddmp'; .*; did you mean 'ddpm'"),
        ({"steps": 0}, "too few steps: got 0; expected at least 2"),
        ({"steps": 1001}, "invalid steps: got 1001; expected 1 … 1000"),
        ({"size": (4, 0)}, r"invalid size=\(4, 0\); expected positive multiples of 2 pixels"),
    ],
)
def test_invalid_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plain_sampler()(**arguments)


def test_a_size_must_be_a_multiple_of_the_patch_size():
    with pytest.raises(ValueError, match=r"invalid size=\(4, 5\); expected positive multiples of 2"):
        sampler()(size=(4, 5))


def test_images_have_the_requested_size():
    images = sampler()([1, 2], size=(4, 10))
    assert images.shape == (2, 4, 10, 1)
    assert images.std() > 0
    assert plain_sampler()(size=8).shape == (1, 8, 8, 1)


def test_numbers_of_numpy_are_numbers():
    components = tiny_components(diffusion__process="flow", model__learn_sigma=False)
    requests = [
        Sampler(components, {}, step=0).request(integer(8), sampler="euler", steps=integer(STEPS))
        for integer in (int, np.int64)
    ]
    assert repr(requests[0]) == repr(requests[1])


def batches_denoised(monkeypatch):
    """The batch sizes that a `PlainModel` is traced with, from now on."""
    seen, denoise = [], PlainModel.denoise

    def counting(self, params, x, t, y, drop=None):
        seen.append(x.shape[0])
        return denoise(self, params, x, t, y, drop)

    monkeypatch.setattr(PlainModel, "denoise", counting)
    return seen


def test_the_null_class_is_computed_only_with_guidance(monkeypatch):
    seen = batches_denoised(monkeypatch)
    for scale, expected in ((1.0, {3}), (1.5, {6})):
        seen.clear()
        plain_sampler()([0, 1, 2], guidance_scale=scale)
        assert set(seen) == expected


def test_a_generation_is_described_by_values_that_pickle():
    spec = GenerationSpec.of(tiny_components(), steps=STEPS, trajectory=True)
    restored = pickle.loads(pickle.dumps(spec))
    assert restored == spec and hash(restored) == hash(spec)
    for other in (
        GenerationSpec.of(tiny_components(model__depth=2), steps=STEPS, trajectory=True),
        GenerationSpec.of(tiny_components(), guidance_scale=1.0, steps=STEPS, trajectory=True),
        GenerationSpec.of(tiny_components(), steps=STEPS + 1, trajectory=True),
    ):
        assert other != spec
    images, labels = jnp.zeros((3, *spec.shape)), jnp.arange(3)
    out = jax.eval_shape(restored.model.denoise, random_params(tiny_components()), images, labels, labels)
    assert out.shape == (3, 4, 4, 2)


def test_equal_descriptions_compile_once(monkeypatch):
    seen = batches_denoised(monkeypatch)
    settings = tiny_settings(sampling__steps=2)
    arguments = {"labels": jnp.array([1]), "seeds": jnp.array([2]), "scale": jnp.float32(2)}
    drawn = [generate({}, **arguments, spec=GenerationSpec.of(PlainComponents(settings))) for _ in range(2)]
    np.testing.assert_array_equal(drawn[0][0], drawn[1][0])
    assert seen == [2]


def test_guidance_moves_the_brightness_of_the_class_away_from_the_null_class():
    one, two, three = (
        plain_sampler()(1, seeds=SEEDS, guidance_scale=scale, return_latents=True)
        for scale in (1.0, 2.0, 3.0)
    )
    np.testing.assert_allclose(one - two, 1 - 1 / 5, rtol=0.1)
    np.testing.assert_allclose(two - three, one - two, rtol=1e-3)


def test_the_config_gives_the_defaults_of_a_call():
    draw = functools.partial(plain_sampler(), seeds=SEEDS, return_latents=True)
    np.testing.assert_array_equal(draw(), draw(sampler="ddim", steps=STEPS, guidance_scale=1.5))
    for other in ({"sampler": "ddpm"}, {"steps": STEPS + 1}, {"guidance_scale": 2.0}):
        assert np.abs(draw() - draw(**other)).max() > 1e-3


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - FLOW_ONLY))
def test_the_trajectory_has_every_step_and_ends_at_the_image(name):
    arguments = {"seeds": SEEDS, "sampler": name}
    trajectory = plain_sampler().trajectory(**arguments)
    assert trajectory.shape == (STEPS, 5, 4, 4, 1)
    assert np.abs(trajectory[-1].astype(int) - plain_sampler()(**arguments)).max() <= 1
    assert len(np.unique(trajectory[-1])) > 10
    assert np.abs(trajectory[0].astype(int) - trajectory[-1]).max() > 1


def test_a_trajectory_takes_the_arguments_of_a_call():
    arguments = {"labels": 2, "seeds": SEEDS, "size": (4, 8), "steps": STEPS, "guidance_scale": 2.0}
    latents = plain_sampler().trajectory(**arguments, return_latents=True)
    assert latents.shape == (STEPS, 5, 4, 8, 1)
    np.testing.assert_array_equal(to_pixels(latents), plain_sampler().trajectory(**arguments))
    np.testing.assert_allclose(latents[-1], plain_sampler()(**arguments, return_latents=True), atol=1e-5)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    return path, write_checkpoint(path, tiny_settings(sampling__ema="0.99"), step=7)


@pytest.mark.parametrize(
    ("ema", "settings", "loaded"),
    [
        (None, None, "0.99"),
        ("0.9", None, "0.9"),
        ("params", None, "params"),
        (None, tiny_settings(), "0.9"),
        (None, tiny_settings(sampling__ema="params"), "params"),
        ("0.99", tiny_settings(), "0.99"),
    ],
)
def test_load_reads_the_requested_average_or_the_default_of_the_settings(workdir, ema, settings, loaded):
    path, trees = workdir
    sampler = dig_jax.load(path, ema, settings=settings)
    assert sampler.step == 7
    assert sampler.components.config == (settings or tiny_settings(sampling__ema="0.99"))
    jax.tree.map(np.testing.assert_array_equal, sampler.params, trees[loaded])


def test_load_refuses_a_sampler_that_the_process_does_not_support(workdir):
    for fields, message in (
        ({"sampling__steps": 1001}, "config.sampling: invalid steps: got 1001; expected 1 … 1000"),
        ({"sampling__sampler": "edm_heun"}, "config.sampling: unsupported process for EDMHeun: got Gaussian"),
        (
            {"sampling__sampler": "eular"},
            "config.sampling: unknown sampler: got 'eular'.*did you mean 'euler'",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            dig_jax.load(workdir[0], settings=tiny_settings(**fields))


def test_evaluations_of_the_network_are_counted_with_guidance():
    components = PlainComponents(tiny_settings(sampling__sampler="heun", sampling__steps=5))
    assert Sampler(components, {}, step=0).evaluations == 18
    unguided = tiny_settings(sampling__sampler="heun", sampling__steps=5, sampling__guidance_scale=1.0)
    assert Sampler(PlainComponents(unguided), {}, step=0).evaluations == 9


def test_a_loaded_sampler_draws_what_a_sampler_of_its_parameters_draws(workdir):
    path, trees = workdir
    settings = tiny_settings(sampling__steps=STEPS, sampling__batch_size=8)
    loaded = dig_jax.load(str(path / "checkpoints" / "7"), settings=settings)
    expected = Sampler(sampler().components, trees["0.9"], step=7)
    draw = {"seeds": SEEDS, "return_latents": True}
    np.testing.assert_array_equal(loaded(**draw), expected(**draw))


def test_load_rejects_settings_of_another_model(workdir):
    with pytest.raises(ConfigError, match="was created with different settings: model.depth: 1 → 2"):
        dig_jax.load(workdir[0], settings=tiny_settings(model__depth=2))
