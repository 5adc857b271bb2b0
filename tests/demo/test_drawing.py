"""Batches of a tiny DiG."""

import logging
import threading

import numpy as np
import pytest
from tiny_autoencoder import write_autoencoder

from dig_jax import Sampler
from dig_jax.data import ImageSpec
from dig_jax.demo import drawing
from dig_jax.demo.drawing import Drawer
from dig_jax.demo.engine import Engine
from dig_jax.errors import UserError
from dig_jax.sampling.sampler import to_pixels
from dig_jax.testing import PlainComponents, random_params, tiny_components, tiny_settings

SEEDS = [3, 1, 4, 15, 9]


@pytest.fixture(scope="module")
def drawer():
    components = tiny_components(sampling__steps=2)
    params = random_params(components)
    return Drawer(Sampler(components, params, step=7), batch_size=3)


@pytest.fixture(scope="module")
def plain():
    """Images of the exact denoiser, which compiles fast."""
    return Drawer(Sampler(PlainComponents(tiny_settings(sampling__steps=2)), {}, step=0), batch_size=3)


def program(drawer, **fields):
    return drawer.menu.read({"class": 0, "steps": 2, **fields}).program


def test_an_image_has_the_same_bits_alone_at_any_place_and_beside_any_others(drawer):
    guided = program(drawer)
    alone = [drawer(guided, [2], [seed], [1.5], None)[0] for seed in SEEDS]
    first = drawer(guided, [2, 4, 2], [3, 8, 1], [1.5, 3.0, 1.5], None)
    second = drawer(guided, [2, 2, 2], [15, 4, 9], [1.5, 1.5, 1.5], None)
    np.testing.assert_array_equal(alone, [first[0], first[2], second[1], second[0], second[2]])
    assert len(np.unique(np.reshape(alone, (5, -1)), axis=0)) == 5


def test_a_model_whose_null_class_nothing_trained_is_offered_without_guidance():
    settings = tiny_settings(sampling__guidance_scale=1.0, training__label_dropout=0.0)
    menu = Drawer(Sampler(PlainComponents(settings), {}, step=0), batch_size=2).menu
    assert menu.usual_scales == (menu.min_scale, menu.max_scale) == (1, 1)
    with pytest.raises(ValueError, match="invalid guidance_scale: got 2; expected a number from 1 to 1"):
        menu.read({"class": 0, "guidance_scale": 2})


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_images_are_those_of_the_sampler_up_to_one_gray_level(plain, scale):
    images = plain(program(plain, guidance_scale=scale), [2, 4], [3, 8], [scale, scale], None)
    expected = plain.sampler([2, 4], seeds=[3, 8], steps=2, guidance_scale=scale)
    assert np.abs(images.astype(int) - expected).max() <= 1
    assert len(np.unique(images)) > 10


@pytest.mark.parametrize("scale", [0.5, 1.5, 12.0, 25.0])
def test_the_menu_and_the_page_have_the_scale_of_the_config(scale):
    settings = tiny_settings(sampling__steps=2, sampling__guidance_scale=scale)
    menu = Drawer(Sampler(PlainComponents(settings), {}, step=0), batch_size=3).menu
    assert menu.to_json()["defaults"]["guidance_scale"] == scale
    least, greatest = menu.usual_scales
    assert menu.min_scale <= least <= menu.default_scale == scale <= greatest <= menu.max_scale


def test_images_of_a_batch_may_have_different_scales_of_guidance(plain):
    together = plain(program(plain), [2, 2], [3, 3], [1.5, 2.0], None)
    assert not np.array_equal(together[0], together[1])
    assert min(len(np.unique(image)) for image in together) > 5  # not black
    for image, scale in zip(together, [1.5, 2.0], strict=True):
        np.testing.assert_array_equal(plain(program(plain), [2], [3], [scale], None)[0], image)


def test_predictions_are_shown_at_each_step_and_the_last_one_is_the_image(plain):
    seen = []
    images = plain(program(plain, steps=5), [1], [3], [1.5], lambda *shown: seen.append(shown))
    assert [evaluations for evaluations, _ in seen] == [1, 2, 3, 4, 5]
    assert plain.evaluations(program(plain, steps=5)) == 5
    assert all(shown.shape == (3, 4, 4, 1) and shown.dtype == np.uint8 for _, shown in seen)
    assert not np.array_equal(seen[0][1], seen[-1][1])
    np.testing.assert_array_equal(seen[-1][1][:1], images)


def test_watching_changes_no_bit(drawer):
    guided = program(drawer)
    watched = drawer(guided, [2], [3], [1.5], lambda *_: None)
    np.testing.assert_array_equal(watched, drawer(guided, [2], [3], [1.5], None))


def test_the_menu_has_only_what_the_model_can_draw(plain):
    menu = plain.menu
    assert menu.samplers[0] == "ddim" and "euler_maruyama" not in menu.samplers  # not for this process
    assert "dopri5" not in menu.samplers  # it takes any number of steps
    assert menu.steps == (2, 5, 10, 20, 50, 100, 250) and menu.default_steps == 2
    assert menu.sizes == ((4, 4), (6, 6), (8, 8)) and menu.trained == 1
    image = plain(program(plain, size=6, sampler="ddpm"), [0], [0], [1.5], None)
    assert image.shape == (1, 6, 6, 1)


def test_the_sizes_of_buckets_are_trained_ones():
    components = PlainComponents(tiny_settings(data__buckets="4x4,2x8,8x8"))
    menu = Drawer(Sampler(components, {}, step=0), batch_size=1).menu
    assert menu.sizes == ((4, 4), (2, 8), (8, 8), (6, 6)) and menu.trained == 3
    assert menu.to_json()["trained_sizes"] == [4, [2, 8], 8]


def test_previews_of_latents_have_the_colors_of_earlier_images(tmp_path, monkeypatch):
    """With a decoder that is a linear map they are the images, at the resolution of the latents."""
    matrix = np.random.default_rng(0).normal(size=(4, 3)) / 10

    def decode(sampler, x):
        return to_pixels(np.repeat(np.repeat(x @ matrix + 0.2, 2, axis=1), 2, axis=2))

    monkeypatch.setattr(Sampler, "decode", decode)
    settings = tiny_settings(sampling__steps=2, autoencoder__path=str(write_autoencoder(tmp_path)))
    components = PlainComponents(settings, ImageSpec((4, 4, 4), tuple("01234")))
    drawer = Drawer(Sampler(components, {}, step=0), batch_size=3)
    shown = []
    for seeds in ([0, 1, 2], [3, 4, 5]):
        images = drawer(program(drawer), [0, 1, 2], seeds, [1.5] * 3, lambda *seen: shown.append(seen[1]))
    assert shown[0].shape == (3, 4, 4, 1)  # nothing was drawn before
    assert np.abs(shown[-1].astype(int) - images[:, ::2, ::2]).max() <= 1


def test_concurrent_requests_get_the_images_of_their_seeds(drawer):
    engine = Engine(drawer, batch_size=3, max_waiting=100)
    random = np.random.default_rng(0)
    requests = [
        drawer.menu.read(
            {
                "class": int(random.integers(5)),
                "seeds": random.integers(2**31, size=random.integers(1, 5)).tolist(),
                "guidance_scale": float(random.choice([1, 1.5, 3])),
                "steps": 2,
            }
        )
        for _ in range(24)
    ]
    results = [None] * len(requests)

    def ask(index):
        results[index] = engine.submit(requests[index]).result.result(timeout=60)

    threads = [threading.Thread(target=ask, args=[index]) for index in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close()
    count = sum(len(request.seeds) for request in requests)
    assert engine.drawn == count and engine.batches < count / 1.5
    for request, images in zip(requests, results, strict=True):
        for seed, image in zip(request.seeds, images, strict=True):
            alone = drawer(request.program, [request.label], [seed], [request.guidance_scale], None)
            np.testing.assert_array_equal(alone[0], image)


def test_few_compiled_programs_stay_in_memory(plain, monkeypatch, caplog):
    monkeypatch.setattr(drawing, "_PROGRAMS", 1)
    drawer = Drawer(plain.sampler, batch_size=1)
    with caplog.at_level(logging.INFO, "dig_jax"):
        for steps in (2, 2, 5, 2):
            drawer(program(drawer, steps=steps), [0], [0], [1.5], None)
    assert [record.args[1] for record in caplog.records] == [2, 5, 2]


def test_images_that_no_png_file_holds_are_refused():
    options = {"image_size": 4, "channels": 2, "num_classes": 5, "length": 60}
    components = PlainComponents(tiny_settings(data__options=options))
    with pytest.raises(UserError, match="unsupported images of 2 channels; expected gray or RGB images"):
        Drawer(Sampler(components, {}, step=0), batch_size=1)
