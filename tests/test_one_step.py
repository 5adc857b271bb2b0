"""MeanFlow models: the network of a flow map, images in one step, and settings that do not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dig_jax.cli.command_line import load_config
from dig_jax.components import Components
from dig_jax.config import from_dict
from dig_jax.data import batches
from dig_jax.demo.drawing import Drawer
from dig_jax.diffusion import FlowMatching, make_sampler
from dig_jax.errors import ConfigError
from dig_jax.models import create_model
from dig_jax.parallel import replicated, to_global
from dig_jax.sampling.generation_spec import GenerationSpec
from dig_jax.sampling.sampler import Sampler
from dig_jax.testing import mean_flow_settings, mesh_of, random_params, tiny_components, tiny_settings
from dig_jax.training.objectives import denoising, mean_flow
from dig_jax.training.state import init_state
from dig_jax.training.step import train_step
from dig_jax.training.train_setup import TrainSetup


@pytest.fixture(scope="module")
def trained():
    """Components and parameters, none of which are zero."""
    components = Components(mean_flow_settings())
    return components, jax.tree.map(jnp.asarray, random_params(components))


def test_the_networks_derivative_along_a_step_is_the_limit_of_differences(trained):
    components, params = trained
    shape = (2, *components.image_spec.image_shape)
    z, v = (jax.random.normal(jax.random.key(i), shape) for i in (0, 1))
    y = jnp.arange(2)

    @jax.jit
    def u(z, t, h):
        jump = jnp.stack([h, 0 * h + 0.5, 0 * h, 0 * h + 1], axis=-1)
        return components.denoise(params, z, components.diffusion.timestep_input(t), y, jump=jump)

    t, h = jnp.array([0.4, 0.9]), jnp.array([0.2, 0.5])
    _, found = jax.jvp(u, (z, t, h), (v, jnp.ones(2), jnp.ones(2)))
    step = 2e-3
    difference = (u(z + step * v, t + step, h + step) - u(z - step * v, t - step, h - step)) / (2 * step)
    assert jnp.linalg.norm(found - difference) < 1e-2 * jnp.linalg.norm(found)


def test_a_step_of_length_zero_without_guidance_is_a_call_without_a_jump(trained):
    components, params = trained
    x = jnp.ones((1, *components.image_spec.image_shape))
    t, y = jnp.array([5.0]), jnp.array([1])
    plain = components.denoise(params, x, t, y)
    jumped = components.denoise(params, x, t, y, jump=jnp.array([[0.0, 0.0, 0.0, 1.0]]))
    np.testing.assert_array_equal(plain, jumped)
    other = components.denoise(params, x, t, y, jump=jnp.array([[0.5, 0.0, 0.0, 1.0]]))
    assert not np.array_equal(plain, other)


def test_one_step_takes_one_evaluation_with_the_scale_of_guidance_as_an_input(trained):
    components, params = trained
    spec = GenerationSpec.of(components)
    assert spec.evaluations == 1
    sampler = Sampler(components, params, step=0)
    images = [sampler([1], guidance_scale=w, return_latents=True) for w in (1.0, 2.0)]
    assert np.abs(images[0] - images[1]).max() > 1e-3


def test_every_other_sampler_uses_the_velocity(trained):
    components, params = trained
    sampler = Sampler(components, params, step=0)

    def draw(scale, interval):
        options = {"sampler": "euler", "steps": 1, "return_latents": True}
        return sampler([1], guidance_scale=scale, guidance_interval=interval, **options)

    assert np.isfinite(draw(2.0, (0.0, 1.0))).all()
    # Training has steps of length 0 with guidance at all times or at none.
    np.testing.assert_array_equal(draw(2.0, (0.4, 1.0)), draw(2.0, (0.0, 1.0)))
    np.testing.assert_array_equal(draw(2.0, (0.0, 0.3)), draw(1.0, (0.0, 1.0)))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": 9.0}, "unsupported guidance_scale=9 of process=meanflow; expected 1 to 8"),
        ({"guidance_scale": 0.5}, "unsupported guidance_scale=0.5"),
        ({"guidance": "apg"}, "unsupported guidance=apg of process=meanflow"),
        ({"guidance_rescale": 0.5}, "unsupported guidance_rescale=0.5 of process=meanflow"),
        ({"guidance_interval": (0.6, 0.9)}, "unsupported guidance_interval=0.6,0.9 of sampler=meanflow"),
        ({"cache_interval": 2}, "unsupported cache_interval=2 of a flow map"),
        ({"clip": True}, "unsupported clip of meanflow"),
        ({"steps": 0}, "invalid steps"),
    ],
)
def test_options_that_it_cannot_honor_are_refused(trained, options, message):
    with pytest.raises(ValueError, match=message):
        GenerationSpec.of(trained[0], **options)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model__flow_map": False}, "config.model.flow_map: invalid flow_map=False for process=meanflow"),
        ({"diffusion__process": "flow"}, "config.model.flow_map: invalid flow_map=True for process=flow"),
        ({"diffusion__path": "vp"}, "config.diffusion: unsupported path of meanflow: got 'vp'"),
        (
            {"training__label_dropout": 0.0},
            "guidance_max=8 with config.training.label_dropout=0, which trains",
        ),
        ({"diffusion__prediction": "noise"}, "unsupported prediction of meanflow: got 'noise'"),
        ({"diffusion__weight": "min_snr"}, "unsupported weight of meanflow: got 'min_snr'"),
        ({"model__internal_head": 1}, "unsupported losses of diffusion.process=meanflow: got internal"),
        ({"auxiliary__dispersive_weight": 0.5}, "got dispersive; expected none"),
    ],
)
def test_settings_that_do_not_fit_meanflow_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainSetup.of(Components(mean_flow_settings(**{"model__depth": 4} | changes)))


@pytest.mark.parametrize("given", ["data", "noise"])
def test_times_that_the_network_would_hardly_see_are_refused_also_in_sampling(given):
    changes = {"model__name": "DiT-S/2", "model__time_input": given}
    message = f"config.diffusion: unsupported model.time_input={given} of process=meanflow: got time_range=10"
    with pytest.raises(ConfigError, match=message):
        GenerationSpec.of(Components(mean_flow_settings(**changes)))
    components = Components(mean_flow_settings(**changes, diffusion__time_range=1000.0))  # as in SiT and REPA
    assert GenerationSpec.of(components).evaluations == 1


def test_the_other_processes_refuse_its_fields_and_its_sampler():
    with pytest.raises(ConfigError, match="unsupported guidance_max of process=flow"):
        _ = Components(tiny_settings(diffusion__process="flow", diffusion__guidance_max=2.0)).diffusion
    with pytest.raises(ValueError, match="unsupported process for meanflow: got FlowMatching"):
        make_sampler("meanflow").check(FlowMatching())
    with pytest.raises(ValueError, match="unsupported flow_map=True of DiS"):
        create_model("DiS-S/2", input_size=8, num_classes=2, rngs=nnx.Rngs(0), flow_map=True)
    model = tiny_components().model_spec.create(nnx.Rngs(0))
    with pytest.raises(ValueError, match="unsupported jump without flow_map"):
        x = jnp.zeros((1, *tiny_components().image_spec.image_shape))
        jax.eval_shape(lambda: model(x, jnp.zeros(1), jump=jnp.zeros((1, 4))))


def test_the_recipe_of_every_family_but_dis_sets_what_meanflow_needs():
    for name in ("dig_s:256,meanflow", "udig_b:256,meanflow", "dit_xl:1024,meanflow", "digits:meanflow"):
        file, _, arguments = name.partition(":")
        settings = from_dict(load_config(f"configs/{file}.py:{arguments}").to_dict())
        components = Components(settings, tiny_components().image_spec)
        setup = TrainSetup.of(components)
        assert setup.objective is mean_flow.loss
        assert GenerationSpec.of(components).evaluations == 1


def test_with_steps_of_length_zero_only_its_metric_is_the_loss_of_flow_matching():
    changes = {"diffusion__instant_fraction": 1.0, "diffusion__guidance_max": 1.0}
    components = Components(mean_flow_settings(**changes))
    params = jax.tree.map(jnp.asarray, random_params(components))
    count, shape = 4, components.image_spec.image_shape
    image = jax.random.normal(jax.random.key(1), (count, *shape))
    batch = {"image": image, "label": jnp.arange(count), "index": jnp.arange(count)}
    key = jax.random.key(2)

    @jax.jit
    def both(params):
        gradient, metrics = jax.grad(
            lambda params: mean_flow.loss(components, params, batch, key, count), has_aux=True
        )(params)
        drawn = denoising.draw(components, key, batch["index"], shape)
        times = mean_flow.draw_jumps(components.diffusion, key, batch["index"], drawn).times
        return (
            gradient,
            metrics["loss"],
            denoising.losses(components, params, batch, drawn._replace(times=times)),
        )

    gradient, loss, expected = both(params)
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_a_train_step_on_four_devices_is_that_on_one():
    components = Components(mean_flow_settings(training__accumulation=2))
    setup = TrainSetup.of(components)
    batch = next(batches(components.train_source, batch_size=8, seed=0, num_threads=0))
    params = random_params(components)
    found = []
    for devices in (1, 4):
        mesh = mesh_of(devices)
        with jax.set_mesh(mesh):
            step = jax.jit(functools.partial(train_step, setup), out_shardings=replicated(mesh))
            state = jax.device_put(init_state(setup, params), replicated(mesh))
            found.append(jax.device_get(step(state, to_global(batch, mesh))))
    (state, metrics), (expected_state, expected_metrics) = found
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-4)
    for leaf, expected in zip(
        *map(jax.tree.leaves, (state["params"], expected_state["params"])), strict=True
    ):
        np.testing.assert_allclose(leaf, expected, atol=1e-4)


def test_the_demo_offers_the_scales_of_guidance_of_training(trained):
    menu = Drawer(Sampler(*trained, step=0), batch_size=2).menu
    assert (menu.min_scale, menu.max_scale) == (1, 8)
    assert menu.samplers[0] == "meanflow" and menu.default_steps == 1
    with pytest.raises(ValueError, match="invalid guidance_scale: got 0.5; expected a number from 1 to 8"):
        menu.read({"class": 0, "guidance_scale": 0.5})


def test_a_model_of_flow_goes_on_as_a_flow_map_with_its_velocities():
    flow = tiny_components(diffusion__process="flow", model__learn_sigma=False)
    parameters = jax.tree.map(jnp.asarray, random_params(flow))
    components = Components(mean_flow_settings(diffusion__time_range=1000.0))
    fresh = components.init_params(jax.random.key(0))
    started = fresh | {name: part for name, part in parameters.items() if name in fresh}
    x, times, y = jnp.ones((2, *flow.image_spec.image_shape)), jnp.array([0.2, 0.9]), jnp.arange(2)
    jump = jnp.array([[0.1, 0.5, 0.0, 1.0], [0.8, 0.0, 0.2, 0.7]])
    found = components.denoise(started, x, components.diffusion.timestep_input(times), y, jump=jump)
    expected = flow.denoise(parameters, x, flow.diffusion.timestep_input(times), y)
    np.testing.assert_array_equal(found, expected)
