"""Adaptive Dormand-Prince: accuracy, evaluations, independence of the batch, and its place in `Sampler`."""

import functools
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_flow import denoiser, float64, flow, no_noise, start  # noqa: F401 (an autouse fixture)

from dig_jax import Sampler
from dig_jax.components import Components, ModelSpec
from dig_jax.diffusion import FlowMatching, GaussianDiffusion, Guidance, Path, make_rule, make_sampler
from dig_jax.diffusion.samplers import Dopri5
from dig_jax.sampling.generate import generate
from dig_jax.sampling.generation_spec import GenerationSpec
from dig_jax.sampling.sample import counted_text, sample
from dig_jax.testing import random_params, tiny_components, tiny_settings, write_checkpoint

FLOW = {"diffusion__process": "flow", "model__learn_sigma": False}


def test_dopri5_follows_the_exact_flow_within_its_tolerance():
    process, sampler = FlowMatching(Path("vp"), "noise"), Dopri5(rtol=1e-6, atol=1e-6, last_time=1e-5)
    drawn = sampler(process, denoiser(process), start(), no_noise)
    expected = flow(process.path, start(), process.last_time, 0)
    np.testing.assert_allclose(drawn, expected, atol=2e-5)


def test_dopri5_switches_guidance_exactly_at_the_ends_of_its_interval():
    process, scale, sampler = FlowMatching(), 2.5, Dopri5(rtol=1e-7, atol=1e-7, last_time=1e-5)
    strong, weak = denoiser(process, 0.2), denoiser(process, -0.4)
    guidance = Guidance(interval=(0.3, 0.8))
    guided = guidance(strong, lambda x, t: (strong(x, t), weak(x, t)), scale)
    drawn, counted = sampler.solve(process, guided, start())
    expected = start()
    for first, last, mean in ((1, 0.8, 0.2), (0.8, 0.3, -0.4 + scale * 0.6), (0.3, 0, 0.2)):
        expected = flow(process.path, expected, first, last, mean=mean)
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    np.testing.assert_array_equal(guidance.kinds(np.array([span.middle for span in counted])), [1, 2, 1, 1])


def test_evaluations_are_counted_per_image_and_no_image_depends_on_its_batch():
    process, seen = FlowMatching(), []
    scales = jnp.array([0.1, 2.0, 7.0, 4.0])[:, None, None, None]

    def solve(x, scale):
        def denoise(x, t):
            jax.debug.callback(lambda t: seen.append(t.shape), t)
            return scale * jnp.sin(x * scale) * (t / 1000)[:, None, None, None]

        x, spans = Dopri5().solve(process, denoise, x)
        return x, sum(span.evaluations for span in spans)

    together, counts = jax.jit(solve)(start(), scales)
    assert len({*counts.tolist()}) == 4
    for i in range(4):
        seen.clear()
        alone, count = jax.jit(solve)(start()[i : i + 1], scales[i : i + 1])
        jax.block_until_ready(alone)
        jax.effects_barrier()
        assert len(seen) == int(count[0]) == int(counts[i])
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-9)


def test_an_image_that_needs_more_than_max_steps_becomes_nan_and_the_others_are_clipped():
    process, scale = FlowMatching(prediction="x"), jnp.array([1.0, 300.0])[:, None, None, None]
    sampler = Dopri5(max_steps=40, clip=True)
    drawn = sampler(process, lambda x, t: 2 * jnp.sin(scale * x), start()[:2], no_noise)
    np.testing.assert_array_equal(np.isfinite(drawn).all((1, 2, 3)), [True, False])
    assert 0.9 < float(jnp.abs(drawn[0]).max()) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0}, "invalid rtol: got 0.0; expected a positive number"),
        ({"max_steps": 0}, "invalid max_steps: got 0; expected a positive number"),
        ({"last_time": 0.0}, "invalid last_time: got 0.0; expected a number between 0 and 0.5"),
        ({"tol": 1.0}, "unknown option of sampler 'dopri5': got 'tol'; .*did you mean 'rtol'"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler("dopri5", **options)


def test_what_dopri5_does_not_support_is_refused(monkeypatch):
    process = FlowMatching()
    with pytest.raises(ValueError, match="unsupported process for Dopri5: got GaussianDiffusion"):
        Dopri5().check(GaussianDiffusion())
    with pytest.raises(ValueError, match="unsupported sampler of a trajectory: got 'dopri5'"):
        Dopri5()(process, denoiser(process), start(), no_noise, return_trajectory=True)
    strong = denoiser(process)
    apg = Guidance(rule=make_rule("apg"))
    momentum = apg(strong, lambda x, t: (strong(x, t), strong(x, t)), 2.0, process)
    with pytest.raises(ValueError, match="unsupported guidance with momentum for dopri5"):
        Dopri5()(process, momentum, start(), no_noise)
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ValueError, match=r"needs the package diffrax: pip install -e '.\[ode\]'"):
        Dopri5().check(process)


class Velocity(ModelSpec):
    """A velocity that compiles fast and depends on every input."""

    def denoise(self, params, x, t, y, drop=None):
        return jnp.sin(4 * x) + (t / 1000 * y)[:, None, None, None]


class VelocityComponents(Components):
    @functools.cached_property
    def model_spec(self):
        return Velocity(self.config.model, self.image_spec.image_shape, self.image_spec.num_classes)


def test_a_sampler_counts_the_evaluations_of_each_image():
    with jax.enable_x64(False):
        settings = tiny_settings(sampling__batch_size=2, sampling__sampler="dopri5", **FLOW)
        sampler = Sampler(VelocityComponents(settings), {}, step=0)
        assert sampler.evaluations is None
        draw = functools.partial(sampler.counted, seeds=[5, 6, 7], return_latents=True)
        plain, counts = draw(guidance_scale=1.0)
        assert plain.shape[0] == len(counts) == 3 and (counts >= 8).all()
        other, count = draw(seeds=[6, 9], guidance_scale=1.0)
        np.testing.assert_allclose(other[0], plain[1], atol=1e-5)
        assert count[0] == counts[1]
        guided, twice = draw(guidance_scale=4.0)
        assert (twice % 2 == 0).all() and np.abs(guided - plain).max() > 1e-3
        assert draw(sampler="euler", steps=3)[1].tolist() == [6, 6, 6]
        with pytest.raises(ValueError, match="unsupported guidance with momentum for dopri5"):
            sampler(guidance="apg", guidance_scale=2.0)
        with pytest.raises(ValueError, match="unsupported sampler of a trajectory: got 'dopri5'"):
            sampler.trajectory()
        with pytest.raises(ValueError, match="dopri5 did not reach its tolerance in max_steps=1"):
            sampler(sampler_options={"max_steps": 1})


def test_the_program_for_a_tpu_mixes_tokens_by_the_kernel_in_two_loops():
    with jax.enable_x64(False):
        components = tiny_components(
            data__options={"image_size": 32, "channels": 1, "num_classes": 5, "length": 60},
            sampling__sampler="dopri5",
            model__dtype="bfloat16",
            model__hidden_size=128,
            model__num_heads=2,
            **FLOW,
        )
        traced = generate.trace(
            random_params(components),
            labels=jnp.zeros(2, jnp.int32),
            seeds=jnp.arange(2, dtype=jnp.int32),
            scale=jnp.float32(2.0),
            spec=GenerationSpec.of(components),
        )
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
    assert text.count("stablehlo.while") == 2  # over steps, and over the evaluations of a step


def test_the_evaluations_of_a_set_of_images_are_logged(tmp_path, caplog):
    options = {"rtol": 0.1, "atol": 0.1}
    with jax.enable_x64(False):
        settings = tiny_settings(sampling__sampler="dopri5", sampling__sampler_options=options, **FLOW)
        write_checkpoint(tmp_path, settings, step=3)
        with caplog.at_level(logging.INFO):
            sample(settings, tmp_path, seeds=np.arange(2))
    (line,) = [record.message for record in caplog.records if "dopri5" in record.message]
    assert line.startswith("drawn with dopri5: ") and "network evaluations per image (" in line
    assert counted_text(np.array([32, 44, 38])) == "38.0 network evaluations per image (32 to 44)"
