"""Parity with the released PyTorch code, by the golden values."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dig_jax import create_model
from dig_jax.convert import load_torch_state_dict, to_torch_state_dict
from dig_jax.convert.names import torch_arrays
from dig_jax.diffusion import classifier_free

GOLDEN = Path(__file__).parent / "golden"
WIDE = {"depth": 4, "hidden_size": 32, "num_heads": 1}
CASES = {
    "dig_plain": ("DiG-S/2", {"depth": 4, "hidden_size": 64, "num_heads": 2}),
    "dig_skip": ("DiG-S/2", WIDE | {"depth": 8, "skip": "linear", "skip_alignment": "upstream"}),
    "dig_bidirectional": ("DiG-S/2", WIDE | {"directions": 2}),
    "dig_causal_noconv": ("DiG-S/2", WIDE | {"directions": 1, "conv": None}),
    "dig_inblockconv_rms": ("DiG-S/2", WIDE | {"conv": "inside", "norm": "rms"}),
    "dig_unconditional_rgb": ("DiG-S/2", WIDE | {"in_channels": 3}),
    "dit": ("DiT-S/2", WIDE),
}


@functools.cache
def golden(case):
    return dict(np.load(GOLDEN / f"{case}.npz"))


def fresh(case, **changes):
    name, options = CASES[case]
    classes = 10 if "y" in golden(case) else 0
    return create_model(name, input_size=8, num_classes=classes, rngs=nnx.Rngs(0), **options | changes)


def loaded(case, prefix="param/", **changes):
    """The model with golden arrays; it has no other values, whose random numbers would be compiled."""
    model = nnx.eval_shape(lambda: fresh(case, **changes))
    return load_torch_state_dict(model, torch_dict(case, prefix))


def torch_dict(case, prefix="param/"):
    return {name[len(prefix) :]: x for name, x in golden(case).items() if name.startswith(prefix)}


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def relative_error(value, expected):
    return np.sqrt(np.square(value - expected).mean() / np.square(expected).mean())


# These run the same code with fewer directions or other channels.
SLOW = ("dig_bidirectional", "dig_causal_noconv", "dig_unconditional_rgb")


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in CASES]
)
def test_outputs_guidance_and_gradients_are_those_of_the_released_code(case):
    data = golden(case)
    graphdef, params = nnx.split(loaded(case))

    @jax.jit
    def forward_and_backward(params, x, t, y, cotangent):
        out, vjp = jax.vjp(lambda params, x: nnx.merge(graphdef, params)(x, t, y), params, x)
        return out, *vjp(cotangent)

    y = jnp.asarray(data["y"], jnp.int32) if "y" in data else None
    t, cotangent = jnp.asarray(data["t"], jnp.int32), nhwc(data["cotangent"])
    out, grads, dx = forward_and_backward(params, nhwc(data["x"]), t, y, cotangent)
    assert relative_error(out, nhwc(data["out"])) < 1e-4
    assert relative_error(dx, nhwc(data["dx"])) < 1e-4

    if torch_dict(case, "grad/"):  # gradients have the names of their parameters
        expected = nnx.split(loaded(case, "grad/"))[1]
        errors = jax.tree.map(lambda a, b: relative_error(np.asarray(a), np.asarray(b)), grads, expected)
        assert max(jax.tree.leaves(errors)) < 1e-4

    if "cfg_out" in data:

        def compiled(x, t, y):  # the program from above: a batch of one, with and without its label
            return forward_and_backward(params, x, t, y, cotangent)[0]

        labels = jnp.asarray(data["cfg_y"][:1], jnp.int32)
        guided = classifier_free(compiled, labels, 10, float(data["cfg_scale"]), channels=3)
        result = guided(nhwc(data["cfg_x"][:1]), jnp.asarray(data["cfg_t"][:1], jnp.int32))
        assert relative_error(result, nhwc(data["cfg_out"][:1])) < 1e-4


def test_raster_aligned_skips_give_another_function_than_the_released_code():
    data = golden("dig_skip")
    graphdef, params = nnx.split(loaded("dig_skip", skip_alignment="raster"))
    t, y = (jnp.asarray(data[name], jnp.int32) for name in "ty")
    out = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x, t, y))(params, nhwc(data["x"]))
    assert relative_error(out, nhwc(data["out"])) > 0.01


def changed(case, **changes):
    return torch_dict(case) | changes


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (lambda: changed("dit", extra=np.zeros(3)), "unexpected: extra"),
        (lambda: {k: v for k, v in torch_dict("dit").items() if "fc1" not in k}, "missing: .*mlp.fc1.weight"),
        (lambda: changed("dit", **{"final_layer.linear.bias": np.zeros(3)}), "wrong shape: final_layer"),
        (lambda: changed("dit", pos_embed=np.zeros((1, 16, 32))), "pos_embed"),
    ],
)
def test_a_state_dict_that_does_not_match_changes_nothing(state_dict, message):
    model = fresh("dit")
    before = jax.tree.map(np.asarray, nnx.split(model)[1])
    with pytest.raises(ValueError, match=message):
        load_torch_state_dict(model, state_dict())
    jax.tree.map(np.testing.assert_array_equal, before, nnx.split(model)[1])


def test_the_two_names_of_an_rms_norm_must_agree():
    state_dict = changed("dig_inblockconv_rms", **{"blocks.1.attn_norm.weight": np.zeros(32)})
    with pytest.raises(ValueError, match=r"blocks.1.norm1.weight and blocks.1.attn_norm.weight differ"):
        load_torch_state_dict(nnx.eval_shape(lambda: fresh("dig_inblockconv_rms")), state_dict)


def test_a_depth_that_upstream_would_rotate_is_an_error():
    model = nnx.eval_shape(lambda: fresh("dig_plain", depth=6))
    with pytest.raises(ValueError, match="unsupported depth: got 6; expected a multiple of directions=4"):
        load_torch_state_dict(model, {})


def test_a_family_without_released_code_is_an_error():
    model = nnx.eval_shape(lambda: fresh("dit"))
    model.family = "U-DiG"
    with pytest.raises(ValueError, match="unsupported model family: got U-DiG; expected DiG or DiT or DiS"):
        load_torch_state_dict(model, {})


@pytest.mark.parametrize("case", ["dig_plain", "dit"])
def test_flow_maps_have_no_names_elsewhere(case):
    model = fresh(case, flow_map=True)
    with pytest.raises(ValueError, match="unsupported flow_map=True; expected False, as in upstream's code"):
        to_torch_state_dict(model)


def test_a_parameter_without_a_name_elsewhere_is_an_error():
    model = nnx.eval_shape(lambda: fresh("dit"))
    with pytest.raises(ValueError, match="unsupported parameter: got experts.kernel; expected those of"):
        torch_arrays(model, {("experts", "kernel"): np.zeros((2, 2))})
