"""Auxiliary losses, on a network of three products in place of a transformer, which takes long to compile."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax.components import Components, ModelSpec, network_params
from dig_jax.diffusion import FlowMatching, GaussianDiffusion
from dig_jax.errors import ConfigError
from dig_jax.models.backbone import Outputs
from dig_jax.models.embeddings import patchify, unpatchify
from dig_jax.parallel import replicated, to_global
from dig_jax.testing import mesh_of, random_params, tiny_settings, write_checkpoint
from dig_jax.training.objectives.auxiliary import losses
from dig_jax.training.objectives.auxiliary.heads import LogVariance, noise_level
from dig_jax.training.objectives.denoising import draw
from dig_jax.training.state import init_params, init_state
from dig_jax.training.step import mean_gradient, train_step
from dig_jax.training.telemetry.step_meter import StepMeter
from dig_jax.training.train import train
from dig_jax.training.train_setup import TrainSetup

SIZE, WIDTH, DEPTH = 8, 32, 3
FLOW = {"diffusion__process": "flow", "model__learn_sigma": False}
INTERNAL = {"model__internal_head": 1}
DISPERSIVE = {"auxiliary__dispersive_weight": 0.5, "auxiliary__dispersive_group": 4}
CONTRASTIVE = {"auxiliary__contrastive_weight": 0.05}
SRA = {"auxiliary__sra_weight": 1.0, "auxiliary__sra_teacher_block": 2}
REPA = {"auxiliary__repa_weight": 0.5, "auxiliary__repa_block": 1}
LOG_VARIANCE = {"auxiliary__log_variance": True}
ALL = INTERNAL | DISPERSIVE | CONTRASTIVE | SRA | REPA | LOG_VARIANCE


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def features(images):
    """Four tokens of six channels, as of an encoder."""
    weights = np.random.default_rng(3).standard_normal((4, 6))
    return jnp.tanh(patchify(images, 2) @ jnp.asarray(weights, images.dtype))


@dataclasses.dataclass(frozen=True)
class ToySpec(ModelSpec):
    """Three residual layers on tokens; `calls` holds the arguments of each call outside of jit."""

    calls: list = dataclasses.field(default_factory=list, compare=False)

    def outputs(self, params, x, t, y, drop=None, taps=(), kept=None):
        assert kept is None  # no stochastic depth
        self.calls.append((params, x, t, y, drop, taps))
        assert y is not None
        label = y if drop is None else jnp.where(drop, self.num_classes, y)
        tokens = patchify(x, 2) @ params["embed"] + 0.1 * (label + t / 500)[:, None, None]
        hidden = []
        for weights in params["layers"]:
            tokens = tokens + jnp.tanh(tokens @ weights)
            hidden.append(tokens)
        output, internal = (unpatchify(hidden[n] @ params["final"], (2, 2), 2) for n in (2, 1))
        head = self.config.internal_head
        seen = {block: hidden[block] for block in taps}
        return Outputs(output, None if head is None else internal, seen, features=[])

    def denoise(self, params, x, t, y, drop=None):
        return self.outputs(params, x, t, y, drop).output


class ToyComponents(Components):
    def init_params(self, key):
        keys = jax.random.split(key, 3)
        shapes = {"embed": (4, WIDTH), "layers": (DEPTH, WIDTH, WIDTH), "final": (WIDTH, 4)}
        return {
            name: 0.2 * jax.random.normal(k, shape)
            for k, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    @functools.cached_property
    def model_spec(self):
        return ToySpec(self.config.model, (4, 4, 1), 5)


def toy(**changes):
    fields = FLOW | {"model__name": "DiT-S/2", "model__depth": DEPTH} | changes
    return ToyComponents(tiny_settings(**fields), features=features)


def batch():
    image = np.random.default_rng(0).standard_normal((SIZE, 4, 4, 1)).astype(np.float32)
    return {"image": image, "label": np.arange(SIZE, dtype=np.int32) % 5}


def gradient(setup, params, batch, teacher=None):
    """Gradient and metrics of the first step's auxiliary objective."""
    objective = functools.partial(setup.auxiliary, teacher=teacher or params)
    return mean_gradient(dataclasses.replace(setup, objective=objective), params, batch, jax.random.key(0))


def assert_close(a, b, rtol=1e-4):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


def test_values_and_gradients_do_not_depend_on_the_number_of_devices():
    """All losses, with groups of 4 images on devices that hold 2."""
    setup = TrainSetup.of(toy(**ALL))
    params = random_params(setup.components)
    expected = jax.jit(functools.partial(gradient, setup))(params, batch())
    mesh = mesh_of(4)
    got = jax.jit(lambda *inputs: gradient(setup, *inputs))(
        jax.device_put(params, replicated(mesh)), to_global(batch(), mesh)
    )
    assert {f"{name}_loss" for name in ("internal", "dispersive", "contrastive", "sra", "repa")} <= set(
        got[1]
    )
    assert_close(got, expected)


def test_losses_of_single_images_add_up_over_micro_batches():
    changes = INTERNAL | SRA | REPA | LOG_VARIANCE
    one, two = (TrainSetup.of(toy(**changes, training__accumulation=count)) for count in (1, 2))
    params = random_params(one.components)
    results = [jax.jit(functools.partial(gradient, setup))(params, batch()) for setup in (one, two)]
    assert_close(*results)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(results[0][0]))


@pytest.mark.parametrize("process", [FLOW, {"diffusion__process": "ddpm", "model__learn_sigma": False}])
def test_the_teacher_sees_the_students_noise_and_labels_at_an_earlier_time(process):
    components = toy(**process, **SRA, training__label_dropout=0.5)
    setup, params = TrainSetup.of(components), random_params(components)
    teacher = jax.tree.map(lambda x: x + 1, params)
    numbered = jax.tree.map(jnp.asarray, batch()) | {"index": jnp.arange(SIZE)}
    assert setup.auxiliary is not None
    setup.auxiliary(components, params, numbered, jax.random.key(0), SIZE, teacher=teacher)
    (student_params, x, t, y, drop, taps), (teacher_params, x2, t2, y2, drop2, taps2) = (
        components.model_spec.calls
    )
    assert (student_params, taps) == (params, (0,)) and (teacher_params, taps2) == (teacher, (2,))
    drawn = draw(components, jax.random.key(0), numbered["index"])
    assert drop is drop2 and y is y2 and 0 < drop.sum() < SIZE
    times = t / 1000 if isinstance(components.diffusion, FlowMatching) else t
    np.testing.assert_allclose(times, drawn.times, rtol=1e-6)
    assert (t2 <= t).all() and (t2 < t).any() and (t - t2 <= 201).all() and (t2 >= 0).all()
    earlier = t2 / 1000 if isinstance(components.diffusion, FlowMatching) else t2
    for seen, at in [(x, times), (x2, earlier)]:
        np.testing.assert_allclose(
            seen, components.diffusion.corrupt(numbered["image"], drawn.noise, at), rtol=1e-5, atol=1e-6
        )


def test_no_gradient_flows_to_the_teacher_or_the_features():
    components = toy(**SRA)
    setup, params = TrainSetup.of(components), random_params(components)
    numbered = jax.tree.map(jnp.asarray, batch()) | {"index": jnp.arange(SIZE)}

    def total(teacher):
        assert setup.auxiliary is not None
        return setup.auxiliary(components, params, numbered, jax.random.key(0), SIZE, teacher=teacher)[0]

    value, gradient = jax.value_and_grad(total)(params)
    assert value > 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))
    x, z = normal(2, 2, 4, 6)
    assert not jax.grad(lambda z: losses.representation(x, z).sum())(z).any()
    assert not jax.grad(lambda z: losses.smooth_l1(x, z).sum())(z).any()


@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_alignment_is_least_at_identical_features(seed):
    z, other = jnp.float32(np.random.default_rng(seed).standard_normal((2, 2, 9, 5)))
    normalized = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    np.testing.assert_allclose(losses.representation(normalized, z), 0, atol=1e-5)
    np.testing.assert_array_equal(losses.smooth_l1(z, z), 0)
    assert (losses.representation(other, z) > 0).all() and (losses.smooth_l1(other, z) > 0).all()
    slope = jax.grad(lambda x: losses.representation(x, z).sum())(normalized)
    np.testing.assert_allclose(slope, 0, atol=1e-5)


def test_the_cosine_is_over_the_channels_of_a_token():
    """The length of each token's vector does not matter; the scale of a channel does."""
    x, z = normal(2, 2, 9, 5)
    lengths = jnp.linspace(1, 3, 18).reshape(2, 9, 1)
    value = losses.representation(x, z)
    np.testing.assert_allclose(losses.representation(x * lengths, z), value, rtol=1e-5)
    assert not np.allclose(losses.representation(x * jnp.arange(1.0, 6), z), value, rtol=1e-2)
    # Features at another scale and place are the same target, and tokens of zeros have a gradient.
    np.testing.assert_allclose(losses.representation(x, 3 * z + 7), value, rtol=1e-3)
    assert np.isfinite(jax.grad(lambda x: losses.representation(x, z).sum())(0 * x)).all()


def test_the_dispersive_loss_is_its_formula_within_each_group():
    z = normal(6, 4, 2)
    flat = np.asarray(z).reshape(2, 3, 8)
    squares = np.square(flat[:, :, None] - flat[:, None]).sum(-1) / 8
    expected = np.log(np.exp(-squares / 0.5).mean((1, 2)))
    np.testing.assert_allclose(losses.dispersive(z, group=3, temperature=0.5), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.dispersive(0 * z + 5, group=6, temperature=0.5), 0, atol=1e-6)
    assert losses.dispersive(100 * z, group=6, temperature=0.5)[0] == pytest.approx(-np.log(6), rel=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "x"])
def test_contrastive_flow_matching_moves_the_optimum_away_from_another_images_target(prediction):
    process, weight = FlowMatching("trigonometric", prediction, weight="velocity"), 0.05
    x0, noise = normal(2, 4, 2, 2, 1)
    given = {"x0": x0, "noise": noise, "times": jnp.array([0.1, 0.3, 0.6, 0.9])}
    target = process.targets(**given)
    other = process.targets(jnp.roll(x0, 1, 0), jnp.roll(noise, 1, 0), given["times"])

    def total(output):
        main = process.loss(output, x_t=output, **given)["loss"]
        return (main + weight * losses.contrastive(process, output, **given)).sum()

    best = (target - weight * other) / (1 - weight)
    np.testing.assert_allclose(jax.grad(total)(best), 0, atol=1e-5)
    assert total(best) < total(target)


def test_the_learned_log_variance_becomes_the_logarithm_of_the_loss():
    """Losses with a known mean by noise level, from 0.05 to 2."""
    head = LogVariance(rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(head)
    level = jnp.linspace(-4, 4, 64)
    mean = 1 / (0.5 + jnp.exp(-0.8 * level) / 4)
    np.testing.assert_array_equal(nnx.merge(graphdef, params)(level), 0)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 2000))

    def step(carry, key):
        params, state = carry
        value = mean * jax.random.exponential(key, level.shape)

        def loss(params):
            u = nnx.merge(graphdef, params)(level)
            return (value * jnp.exp(-u) + u).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    start = params, optimizer.init(params)
    (params, _), _ = jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(jax.random.key(1), 2000)))()
    error = nnx.merge(graphdef, params)(level) - jnp.log(mean)
    assert jnp.sqrt(jnp.square(error).mean()) < 0.1


@pytest.mark.parametrize(
    "process", [FlowMatching(), FlowMatching("vp"), GaussianDiffusion(learn_sigma=False)]
)
def test_the_noise_level_is_the_logarithm_of_noise_to_signal_and_finite_at_the_ends(process):
    times = process.times_at(jnp.array([0.0, 0.3, 0.7, 0.999]))
    level = noise_level(process, times)
    assert np.isfinite(level).all() and (np.diff(level) > 0).all()
    if process == FlowMatching():
        np.testing.assert_allclose(level[1], np.log(0.3 / 0.7), rtol=1e-4)


def test_after_its_last_step_a_loss_leaves_nothing_behind_bit_for_bit():
    """From one state, with and without the losses: steps differ before `until`, and not after it."""
    ended, plain = toy(**ALL, auxiliary__until=1), toy(**INTERNAL, **LOG_VARIANCE)
    setups = TrainSetup.of(ended), TrainSetup.of(plain)
    params = init_params(plain)
    extra = init_params(ended)["auxiliary"]
    states = (
        init_state(setups[0], params | {"auxiliary": extra | params["auxiliary"]}),
        init_state(setups[1], params),
    )
    steps = [jax.jit(functools.partial(train_step, setup)) for setup in setups]
    for number, same in [(0, False), (1, True)]:
        (new, metrics), (expected, expected_metrics) = (
            step(state | {"step": jnp.int32(number)}, batch())
            for step, state in zip(steps, states, strict=True)
        )
        found = network_params(new["params"])
        equal = jax.tree.map(np.array_equal, found, network_params(expected["params"]))
        assert all(jax.tree.leaves(equal)) == same
        if same:
            assert np.isnan(metrics["sra_loss"])
            for name, value in expected_metrics.items():
                np.testing.assert_array_equal(metrics[name], value, err_msg=name)
            u = new["params"]["auxiliary"]["log_variance"], expected["params"]["auxiliary"]["log_variance"]
            jax.tree.map(np.testing.assert_array_equal, *u)


def test_without_auxiliary_losses_there_are_neither_heads_nor_metrics():
    setup = TrainSetup.of(toy())
    assert setup.auxiliary is None and setup.lasting is None
    assert "auxiliary" not in init_params(setup.components)


def test_rows_of_metrics_hold_the_mean_of_the_steps_that_compute_a_loss():
    meter, shared = StepMeter(8), {"grad_norm": 1.0, "learning_rate": 0.1, "loss": 1.0, "skipped": 0}
    shared |= {"loss_sum": np.ones(4), "count": np.ones(4)}
    for step, value in enumerate([1.0, 3.0, np.nan], 1):
        meter.add(step, shared | {"sra_loss": np.float32(value), "repa_loss": np.float32(np.nan)})
    row = meter.take(3)
    assert row["sra_loss"] == 2 and "repa_loss" not in row


def test_distillation_is_the_distance_to_the_other_models_output():
    components = toy(auxiliary__distill_weight=0.5, auxiliary__distill_from="elsewhere")
    setup, params = TrainSetup.of(components), random_params(components)
    params, images = jax.tree.map(jnp.asarray, (params, batch()))
    other = jax.tree.map(lambda x: 1.1 * x, params)

    def metrics(distilled):
        objective = functools.partial(
            setup.auxiliary, teacher=params, distilled=(components.model_spec, distilled)
        )
        parts = dataclasses.replace(setup, objective=objective)
        return mean_gradient(parts, params, images, jax.random.key(0))

    grads, same = metrics(params)
    plain, _ = mean_gradient(setup, params, images, jax.random.key(0))
    assert same["distill_loss"] == 0
    assert_close(grads, plain)
    _, differs = metrics(other)
    drawn = draw(components, jax.random.key(0), jnp.arange(SIZE))
    x_t = components.diffusion.corrupt(images["image"], drawn.noise, drawn.times)
    inputs = (x_t, components.diffusion.timestep_input(drawn.times), images["label"], drawn.drop)
    outputs = [components.model_spec.denoise(each, *inputs) for each in (params, other)]
    np.testing.assert_allclose(
        differs["distill_loss"], np.mean(np.square(outputs[0] - outputs[1])), rtol=1e-5
    )


def test_the_variance_is_distilled_if_both_models_learn_one():
    student, teacher = normal(3, 2, 2, 4), normal(3, 2, 2, 4)[::-1]
    both, prediction = (
        losses.distillation(student, other, channels=2) for other in (teacher, teacher[..., :2])
    )
    error = np.square(student - teacher)
    np.testing.assert_allclose(prediction, error[..., :2].mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(both - prediction, error[..., 2:].mean((1, 2, 3)), rtol=1e-5)


def test_a_run_distills_a_trained_model_of_another_family(tmp_path):
    write_checkpoint(tmp_path / "teacher", tiny_settings(**FLOW, model__name="DiT-S/2"), step=3)
    student = {
        "training__steps": 2,
        "logging__every_steps": 1,
        "auxiliary__distill_weight": 1.0,
        "auxiliary__distill_from": str(tmp_path / "teacher"),
    }
    train(tiny_settings(**FLOW, **student), tmp_path / "student")
    rows = (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["distill_loss"] > 0 for row in rows] == [True, True]
    with pytest.raises(ConfigError, match="config.auxiliary: distill_from=.* has diffusion.process='flow'"):
        train(tiny_settings(**student), tmp_path / "ddpm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SRA | {"auxiliary__sra_block": 3}, "config.auxiliary: invalid sra_block=3; expected at most 2"),
        (SRA | {"auxiliary__sra_teacher_block": 7}, "invalid sra_teacher_block=7; expected at most 2"),
        (
            DISPERSIVE | {"auxiliary__dispersive_group": 3},
            "invalid dispersive_group=3; expected a divisor of 8",
        ),
        (
            CONTRASTIVE | {"diffusion__process": "ddpm"},
            "unsupported contrastive_weight=0.05; expected 0, or config.diffusion.process=flow",
        ),
        ({"auxiliary__contrastive_weight": 1.0}, "invalid config.auxiliary.contrastive_weight=1.0"),
        ({"auxiliary__distill_weight": 1.0}, "unsupported distill_weight=1.0 without distill_from"),
    ],
)
def test_settings_that_do_not_fit_raise_errors_that_name_them(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainSetup.of(toy(**changes))


def test_representation_alignment_needs_features_with_a_token_per_token():
    config = toy(**REPA).config
    with pytest.raises(ConfigError, match="unsupported repa_weight=0.5 without features"):
        TrainSetup.of(ToyComponents(config))
    with pytest.raises(ConfigError, match="got 2 tokens per image; expected 2 × 2"):
        TrainSetup.of(ToyComponents(config, features=lambda images: features(images)[:, :2]))
