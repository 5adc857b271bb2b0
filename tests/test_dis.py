"""DiS: sizes, outputs of the released code, training options and bad input."""

import functools
import math

import dis_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dig_jax
from dig_jax.models.registry import FAMILIES
from dig_jax.testing import tiny_settings
from dig_jax.training.train import train

# Million parameters at 256 px with 1,000 classes, from the definition of the released code.
MILLIONS = {
    "S": 29.1,
    "B": 121.2,
    "M": 231.4,
    "L": 407.2,
    "H": 907.0,
    "384x24": 31.6,
    "768x26": 130.4,
    "1024x56": 472.0,
    "1152x64": 677.0,
}
create = functools.partial(
    dig_jax.create_model,
    "DiS-S/2",
    input_size=8,
    num_classes=3,
    depth=4,
    hidden_size=24,
)


def load(state_dict, **options):
    """Return a model with these parameters; its own random ones are never computed."""
    model = nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0), **options))
    return dig_jax.convert.load_torch_state_dict(model, state_dict)


@pytest.fixture(scope="module")
def model():
    """The golden model in our layout."""
    return load(reference.state_dict())


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(reference.GOLDEN))


@pytest.fixture(scope="module")
def given(golden):
    """The golden images, timesteps and labels in our layout."""
    return (
        jnp.asarray(nhwc(golden["x"]), jnp.float32),
        jnp.asarray(golden["t"]),
        jnp.asarray(golden["y"], int),
    )


@pytest.fixture(scope="module")
def outputs(model, given):
    """The golden model's output, and its tokens after two blocks."""
    return nnx.jit(lambda model: tuple(model.outputs(*given, taps=(2, 4))[::2]))(model)


def nhwc(x):
    return x.transpose(0, 2, 3, 1)


def test_the_table_has_every_size():
    assert MILLIONS.keys() == FAMILIES["DiS"].sizes.keys()


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=() if s in ("S", "1152x64") else pytest.mark.slow) for s in MILLIONS]
)
def test_each_size_has_the_parameters_of_the_released_code(size):
    model = nnx.eval_shape(
        lambda: dig_jax.create_model(f"DiS-{size}/2", input_size=32, num_classes=1000, rngs=nnx.Rngs(0))
    )
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.split(model)[1]))
    assert round(count / 1e6, 1) == MILLIONS[size]


def test_outputs_are_those_of_the_released_code(outputs, golden):
    expected = nhwc(golden["out"])
    assert np.abs(outputs[0] - expected).max() < 1e-5 * np.abs(expected).max()


def test_unconditional_outputs_are_those_of_the_released_code(golden, given):
    model = load(reference.state_dict(classes=0), num_classes=0)
    out = nnx.jit(lambda model: model(*given[:2]))(model)
    expected = nhwc(golden["unconditional"])
    assert np.abs(out - expected).max() < 1e-5 * np.abs(expected).max()


def test_taps_are_the_tokens_of_the_patches_after_a_block(outputs):
    _, hidden = outputs
    assert {block: tokens.shape for block, tokens in hidden.items()} == dict.fromkeys((2, 4), (2, 16, 24))
    assert not np.allclose(hidden[2], hidden[4], atol=0.1)


@pytest.mark.slow  # compiles for half a minute
def test_gradients_with_rematerialization_are_slopes_of_the_reference(outputs, golden, given):
    model = load(reference.state_dict(), remat="full")
    cotangent = np.random.default_rng(3).standard_normal(golden["out"].shape)
    weights = jnp.asarray(nhwc(cotangent), jnp.float32)

    def loss(model):
        out = model(*given)
        return jnp.sum(out * weights), out

    gradients, out = nnx.jit(nnx.grad(loss, has_aux=True))(model)
    np.testing.assert_allclose(out, outputs[0], rtol=1e-5, atol=1e-5)
    nnx.update(model, gradients)
    gradients = dig_jax.convert.to_torch_state_dict(model)
    assert all(np.abs(gradient).max() > 0 for gradient in gradients.values())
    for name, params in reference.state_dict().items():
        assert gradients[name].shape == params.shape
    rng = np.random.default_rng(4)
    changes = {name: rng.standard_normal(x.shape) for name, x in reference.state_dict().items()}
    low, high = (
        np.sum(cotangent * reference.forward(moved(changes, step), **reference.inputs()))
        for step in (-1e-5, 1e-5)
    )
    expected = sum(np.sum(gradients[name] * change) for name, change in changes.items())
    assert (high - low) / 2e-5 == pytest.approx(expected, rel=1e-4)


def moved(changes, step):
    return {name: x + step * changes[name] for name, x in reference.state_dict().items()}


def test_the_golden_file_is_what_its_generator_writes(golden):
    assert np.allclose(
        golden["out"], reference.forward(reference.state_dict(), **reference.inputs()), atol=1e-12
    )


def test_released_names_load_strictly_and_are_written_back_bit_by_bit(model):
    state_dict = reference.state_dict()
    written = dig_jax.convert.to_torch_state_dict(model)
    assert written.keys() == state_dict.keys()
    assert all(np.array_equal(written[name], state_dict[name]) for name in written)
    state_dict["in_blocks.0.mixer.A_c_log"] = state_dict.pop("in_blocks.0.mixer.A_b_log")
    with pytest.raises(ValueError, match="missing: in_blocks.0.mixer.A_b_log; unexpected: .*A_c_log"):
        dig_jax.convert.load_torch_state_dict(model, state_dict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 5}, "invalid depth=5 of DiS; expected an even number"),
        ({"num_heads": 2}, "unsupported num_heads=2 of DiS; expected 1: it has no heads"),
        ({"mlp_hidden_size": 64}, "unsupported mlp_hidden_size=64 of DiS; expected None: it has no MLP"),
        ({"conv": None}, "unknown option 'conv' of DiS"),
    ],
)
def test_options_that_dis_lacks_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        create(rngs=nnx.Rngs(0), **options)


@pytest.mark.slow
def test_a_run_trains_resumes_samples_and_refuses_what_dis_lacks(tmp_path):
    fields = {"model__name": "DiS-S/2", "model__depth": 2, "training__steps": 2, "checkpoint__every_steps": 1}
    train(tiny_settings(**fields), tmp_path)
    train(tiny_settings(**fields | {"training__steps": 3}), tmp_path)
    sampler = dig_jax.load(tmp_path)
    assert sampler([1, 2], seeds=[0, 1], sampler="ddim", steps=2).shape == (2, 4, 4, 1)
    with pytest.raises(ValueError, match="unsupported cache_interval=2 of DiS; expected 1"):
        sampler([1], seeds=[0], sampler="ddim", steps=4, cache_interval=2)
    with pytest.raises(ValueError, match="unsupported guidance 'perturbed' of DiS"):
        sampler([1], seeds=[0], sampler="ddim", steps=2, guidance="perturbed", guidance_scale=2.0)
    with pytest.raises(ValueError, match="invalid input size of DiS: got 4×8; expected 4×4"):
        sampler([1], seeds=[0], sampler="ddim", steps=2, size=(4, 8))


def test_calls_that_dis_does_not_support_are_rejected(model):
    x, t = jnp.zeros((1, 4, 16, 4)), jnp.zeros(1)
    with pytest.raises(ValueError, match="invalid input size of DiS: got 4×16; expected 8×8, because its"):
        model(x, t)
    with pytest.raises(ValueError, match="unsupported features of DiS; expected None"):
        model.outputs(x, t, features="keep")
    with pytest.raises(ValueError, match="block out of range: got 5; expected 0 … 4"):
        model.outputs(jnp.zeros((1, 8, 8, 4)), t, taps=[5])
