"""Guidance and sampler options through `Sampler` and the config."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dig_jax
from dig_jax import ConfigError, Sampler
from dig_jax.components import ModelSpec
from dig_jax.diffusion import FlowMatching
from dig_jax.diffusion.guidance import RULES
from dig_jax.models.isolation import isolate_tokens
from dig_jax.models.mixers import GatedLinearAttention
from dig_jax.sampling.generation_spec import GenerationSpec
from dig_jax.sampling.sample import evaluations_text
from dig_jax.testing import PlainComponents, random_params, tiny_components, tiny_settings, write_checkpoint

DRAW = {"seeds": [3, 1], "return_latents": True}
FLOW = {"diffusion__process": "flow", "model__learn_sigma": False}


@functools.cache
def sampler(**fields):
    components = tiny_components(
        sampling__steps=4, sampling__batch_size=2, model__depth=3, model__internal_head=1, **FLOW, **fields
    )
    return Sampler(components, random_params(components), step=0)


@pytest.fixture(scope="module")
def weak_model(tmp_path_factory):
    """The workdir of a smaller model."""
    path = tmp_path_factory.mktemp("weak")
    write_checkpoint(path, tiny_settings(**FLOW), step=3)
    return str(path)


def plain_draw():
    return sampler()(guidance_scale=1.0, **DRAW)


@pytest.mark.parametrize(
    "rule",
    [
        rule if rule in ("classifier_free", "autoguidance") else pytest.param(rule, marks=pytest.mark.slow)
        for rule in RULES
    ],
)
def test_a_scale_of_one_is_no_guidance_bit_for_bit_and_runs_one_pass(rule, monkeypatch, weak_model):
    expected, seen, denoise = plain_draw(), [], ModelSpec.denoise

    def counting(self, params, x, t, y, drop=None):
        seen.append(x.shape[0])
        return denoise(self, params, x, t, y, drop)

    monkeypatch.setattr(ModelSpec, "denoise", counting)
    jax.clear_caches()
    options = {
        "guidance": rule,
        "weak_model": weak_model,
        "guidance_rescale": 0.5,
        "guidance_interval": (0.2, 0.7),
    }
    np.testing.assert_array_equal(sampler()(guidance_scale=1.0, **options, **DRAW), expected)
    assert seen == [2]
    assert GenerationSpec.of(sampler().components, guidance_scale=1.0, **options).evaluations == 4


def test_an_internal_scale_of_one_is_the_plain_sampler_and_others_extrapolate_from_the_internal_head():
    expected = plain_draw()
    np.testing.assert_array_equal(
        sampler()(guidance_scale=1.0, internal_guidance_scale=1.0, **DRAW), expected
    )
    one_step = {"guidance_scale": 1.0, "steps": 1, **DRAW}
    half, one, two = (sampler()(internal_guidance_scale=w, **one_step) for w in (0.5, 1.0, 2.0))
    assert np.abs(two - one).max() > 1e-3
    np.testing.assert_allclose(two - one, 2 * (one - half), atol=1e-5)
    assert (
        GenerationSpec.of(sampler().components, internal_guidance_scale=2.0, guidance_scale=1.0).evaluations
        == 4
    )


def test_autoguidance_extrapolates_from_the_weaker_model(weak_model):
    one_step = {"steps": 1, "sampler": "euler", **DRAW}
    weak = dig_jax.load(weak_model)(guidance_scale=1.0, **one_step)
    strong = sampler()(guidance_scale=1.0, **one_step)
    guided = sampler()(guidance="autoguidance", weak_model=weak_model, guidance_scale=2.5, **one_step)
    np.testing.assert_allclose(guided, weak + 2.5 * (strong - weak), atol=1e-5)


def test_evaluations_are_counted_per_network(weak_model):
    options = {"sampling__weak_model": weak_model, "sampling__guidance": "autoguidance"}
    counts = sampler(**options, sampling__guidance_interval=(0.3, 0.8)).evaluations_by_network
    assert counts == {"model": 4, "weaker model": 2}  # times 1, 0.75, 0.5, 0.25
    assert evaluations_text(counts) == (
        "6 network evaluations per image (4 of the model, 2 of the weaker model)"
    )
    assert sampler(sampling__guidance="cfg_zero").evaluations_by_network == {"model": 6}
    assert sampler(sampling__guidance_interval=(0.0, 0.6)).evaluations_by_network == {"model": 6}


def test_isolated_tokens_see_only_themselves():
    width, grid = 32, (3, 4)
    mixer = GatedLinearAttention(width, num_heads=1, direction="column", dtype=jnp.float32, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(mixer)
    params = {"blocks": {"rest": {0: {"mixer": nnx.to_pure_dict(state)}}}}
    isolated = nnx.merge(graphdef, isolate_tokens(params)["blocks"]["rest"][0]["mixer"])
    x = jax.random.normal(jax.random.key(0), (1, 12, width))
    moved = x.at[0, 5].add(1.0)
    differs = np.abs(isolated(moved, grid) - isolated(x, grid)).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(differs, np.arange(12) == 5)
    assert (np.abs(mixer(moved, grid) - mixer(x, grid)).max(axis=(0, 2)) > 0).sum() > 1
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    o = jnp.sum(q * k, axis=-1, keepdims=True) * (width // 2) ** -0.5 * v
    o = o / jnp.sqrt(jnp.mean(o**2, axis=-1, keepdims=True) + 1e-6) * jax.nn.silu(mixer.gate_proj(x))
    np.testing.assert_allclose(isolated(x, grid), mixer.o_proj(o), atol=1e-5)


@pytest.mark.parametrize(("blocks", "changed"), [((), range(7)), ((1, 5, 6), (1, 5, 6))])
def test_the_named_blocks_are_isolated_in_stacked_parameters(blocks, changed):
    params = random_params(tiny_components(model__depth=7))
    after = isolate_tokens(params, blocks)["blocks"]
    groups = [after["groups"][i]["mixer"]["decay_up"]["bias"][0, 0] for i in range(4)]
    rest = [after["rest"][i]["mixer"]["decay_up"]["bias"][0] for i in range(3)]
    np.testing.assert_array_equal(np.array(groups + rest) < -1e5, [i in changed for i in range(7)])


def test_perturbed_guidance_extrapolates_from_the_isolated_blocks():
    one_step = {"steps": 1, "sampler": "euler", **DRAW}
    isolated = Sampler(sampler().components, isolate_tokens(sampler().params, (1,)), step=0)
    weak, strong = (each(guidance_scale=1.0, **one_step) for each in (isolated, sampler()))
    assert np.abs(weak - strong).max() > 1e-3
    guided = sampler()(guidance="perturbed", guidance_options={"blocks": [1]}, guidance_scale=3.0, **one_step)
    np.testing.assert_allclose(guided, weak + 3 * (strong - weak), atol=1e-4)


def test_perturbed_guidance_isolates_softmax_attention_in_all_blocks():
    options = {"model__name": "DiT-S/2", "sampling__steps": 1, "sampling__sampler": "euler"}
    plain, isolated = (tiny_components(**options, **FLOW) for _ in range(2))
    isolated.__dict__["model_spec"] = dataclasses.replace(plain.model_spec, isolated=True)
    params = random_params(plain)
    x, t, y = jnp.ones((2, 4, 4, 1)).at[1, 0, 0].add(1.0), jnp.ones(2), jnp.zeros(2, jnp.int32)
    outputs = np.asarray(
        jax.jit(isolated.denoise)(params, x, t, y)
    )  # the second image has another first token
    first = np.kron([[1, 0], [0, 0]], np.ones((2, 2))) > 0
    np.testing.assert_array_equal(np.abs(outputs[1] - outputs[0]).max(-1) > 0, first)
    weak, strong = (
        Sampler(components, params, step=0)(guidance_scale=1.0, **DRAW) for components in (isolated, plain)
    )
    assert np.abs(weak - strong).max() > 1e-4
    draw = functools.partial(Sampler(plain, params, step=0), guidance="perturbed", guidance_scale=3.0, **DRAW)
    np.testing.assert_allclose(draw(), weak + 3 * (strong - weak), atol=1e-4)
    with pytest.raises(ValueError, match="block 0 has no GLA; expected blocks with GLA, or none"):
        draw(guidance_options={"blocks": [0]})


@functools.cache
def plain_sampler(**fields):
    return Sampler(PlainComponents(tiny_settings(sampling__steps=3, **fields)), {}, step=0)


def test_options_of_the_sampler_come_from_the_config_or_the_call():
    draw = functools.partial(plain_sampler(), **DRAW)
    noisy = draw(sampler_options={"eta": 1})
    assert np.abs(noisy - draw()).max() > 1e-3
    configured = plain_sampler.__wrapped__(sampling__sampler_options={"eta": 1.0})
    np.testing.assert_array_equal(configured(**DRAW), noisy)
    np.testing.assert_array_equal(configured(sampler="euler", **DRAW), draw(sampler="euler"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampler_options": {"eat": 1.0}},
            "unknown option of sampler 'ddim': got 'eat'; .*did you mean 'eta'",
        ),
        ({"sampler_options": {"eta": "x"}}, "invalid eta of sampler 'ddim': got 'x'; expected float"),
        ({"sampler_options": {"eta": 2.0}}, "eta out of range: got 2.0; expected 0 … 1"),
        ({"guidance": "cfg_zeor"}, "unknown guidance: got 'cfg_zeor'; .*did you mean 'cfg_zero'"),
        ({"guidance": "cfg_zero"}, "unsupported process for CFGZero: got GaussianDiffusion; expected Flow"),
        ({"guidance": "autoguidance"}, "missing weak_model: guidance 'autoguidance' expects a weaker"),
        ({"guidance_interval": (0.5,)}, "invalid interval: got .*expected two increasing numbers"),
        ({"internal_guidance_scale": 1.4}, "unsupported internal_guidance_scale=1.4; expected 1, or a model"),
        ({"time_shift": 0}, "unsupported time_shift=0 with process=ddpm; expected 1, or flow matching"),
        ({"guidence": "apg"}, "unknown option: got 'guidence'; .*did you mean 'guidance'"),
    ],
)
def test_invalid_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        plain_sampler()(**options)


def test_a_null_class_that_nothing_trains_is_refused():
    undropped = plain_sampler(training__label_dropout=0.0, sampling__guidance_scale=1.0)
    assert undropped(**DRAW, guidance_scale=1.0).size
    assert undropped.request(guidance="perturbed", guidance_scale=2.0).spec.guidance is not None
    with pytest.raises(ValueError, match="guidance_scale=2 of a model trained with training.label_dropout=0"):
        undropped(**DRAW, guidance_scale=2.0)


def test_latents_are_not_clipped():
    with pytest.raises(ValueError, match="unsupported clip of latents"):
        plain_sampler(autoencoder__path="missing")(**DRAW, clip=True)


def shifted_process(shape=None, time_shift=0.0, **fields):
    of = functools.partial(
        GenerationSpec.of, tiny_components(**FLOW, **fields), shape=shape, sampler="euler", guidance_scale=1.0
    )
    return of(), of(time_shift=time_shift)


def test_times_shift_by_the_square_root_of_the_ratio_of_tokens_and_only_when_sampling():
    spec, given = shifted_process((8, 24, 1), diffusion__time_shift=3.0)  # the training images are 4 × 4
    assert isinstance(spec.process, FlowMatching)
    scale = 12**0.5
    t = spec.process.knots(5).times
    np.testing.assert_allclose(given.process.knots(5).times, scale * t / (1 + (scale - 1) * t), atol=1e-15)
    assert given.process == dataclasses.replace(
        spec.process, times=dataclasses.replace(spec.process.times, shift=3 * scale)
    )
    assert given.model == spec.model
    configured, _ = shifted_process((8, 24, 1), diffusion__time_shift=3.0, sampling__time_shift=0.0)
    assert configured == given
    _, by_hand = shifted_process((8, 24, 1), time_shift=2.0, diffusion__time_shift=3.0)
    assert isinstance(by_hand.process, FlowMatching)
    assert by_hand.process.times.shift == 6


def test_times_do_not_shift_at_the_size_of_the_training_images():
    spec, given = shifted_process()
    assert spec == given


@pytest.mark.parametrize("name", ["euler_maruyama", "edm_heun", "dopri5"])
def test_samplers_with_times_of_their_own_refuse_a_shift(name):
    with pytest.raises(ValueError, match=f"unsupported time_shift=2 with sampler='{name}'; expected 1"):
        GenerationSpec.of(tiny_components(**FLOW), sampler=name, time_shift=2.0)


def test_invalid_options_of_the_config_name_the_config():
    for fields, message in (
        ({"sampling__guidance": "apgg"}, "config.sampling: unknown guidance: got 'apgg'"),
        (
            {"sampling__guidance_options": {"eta": 1.0}},
            "config.sampling: unknown option of guidance",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            _ = plain_sampler.__wrapped__(**fields).evaluations


def test_a_weaker_model_of_other_images_or_another_process_is_refused(tmp_path):
    others = {
        "process='ddpm'; expected 'flow'": {},
        "noise_scale=2; expected 1": FLOW | {"diffusion__noise_scale": 2.0},
    }
    for number, (message, fields) in enumerate(others.items()):
        path = tmp_path / str(number)
        write_checkpoint(path, tiny_settings(**fields), step=3)
        with pytest.raises(ValueError, match=f"has diffusion.{message}"):
            sampler()(guidance="autoguidance", weak_model=str(path), guidance_scale=2.0, **DRAW)
