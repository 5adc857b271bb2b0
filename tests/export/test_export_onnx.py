"""The sampler as an ONNX graph, run by ONNX Runtime."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

import dig_jax
from dig_jax import ConfigError, UserError
from dig_jax.export import jaxpr_to_onnx
from dig_jax.export.export import export
from dig_jax.export.jaxpr_to_onnx import UnsupportedError, to_onnx
from dig_jax.export.onnx import in_float32
from dig_jax.sampling.generate import noise
from dig_jax.testing import tiny_settings, write_checkpoint

GUIDED = {"sampling__sampler": "ddim", "sampling__steps": 3, "sampling__guidance_scale": 2.0}


def session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options)


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """A file that tests must not change."""
    path = tmp_path_factory.mktemp("exported") / "digits.onnx"
    export(tiny_settings(**GUIDED), workdir, path)
    return path


def assert_draws_the_same(path, sampler, seeds, guidance_scale=None):
    """Compare with the sampler, from the noise of its seeds."""
    labels, seeds = sampler.resolve(None, seeds)
    start = noise(jnp.asarray(seeds), jnp.int32(0), sampler.components.image_spec.image_shape)
    inputs = {"labels": labels, "noise": np.asarray(start)}
    options = {"guidance_scale": guidance_scale} if guidance_scale else {}
    inputs |= {name: np.asarray(value, np.float32) for name, value in options.items()}
    (images,) = session(path).run(["images"], inputs)
    expected = sampler(labels, seeds=seeds, return_latents=True, **options)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1))


def test_onnx_runtime_draws_what_the_sampler_draws_for_100_seeds(workdir, exported):
    sampler = dig_jax.load(workdir, settings=tiny_settings(**GUIDED))
    assert_draws_the_same(exported, sampler, np.arange(100), guidance_scale=1.5)


def test_the_file_describes_itself_and_takes_any_batch_size(exported):
    model = onnx.load(exported)
    shapes = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in model.graph.input
    }
    assert shapes == {"labels": ["b"], "noise": ["b", 4, 4, 1], "guidance_scale": []}
    (about,) = [json.loads(entry.value) for entry in model.metadata_props if entry.key == "about"]
    assert (about["step"], about["ema"], about["images"]["image_shape"]) == (7, "0.9", [4, 4, 1])


def test_the_same_export_again_writes_nothing_and_another_one_is_refused(workdir, exported, caplog):
    caplog.set_level("INFO")
    before = exported.stat().st_mtime_ns
    export(tiny_settings(**GUIDED), workdir, exported)
    assert f"{exported} already holds the sampler of step 7 (0.9)" in caplog.messages
    with pytest.raises(ConfigError, match=f"--output={exported} exists and holds something else"):
        export(tiny_settings(**GUIDED | {"sampling__steps": 2}), workdir, exported)
    assert exported.stat().st_mtime_ns == before


def test_samplers_without_an_onnx_form_and_a_missing_package_are_one_line(workdir, tmp_path, monkeypatch):
    path = tmp_path / "x.onnx"
    with pytest.raises(ConfigError, match="unsupported config.sampling.sampler='ddpm' of an ONNX file"):
        export(tiny_settings(sampling__sampler="ddpm"), workdir, path)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no ONNX form: got .* 'dot_general'"):
        patch.delitem(jaxpr_to_onnx.TRANSLATIONS, "dot_general")
        export(tiny_settings(**GUIDED), workdir, path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"needs the package onnx: pip install -e '.\[export\]'"):
        export(tiny_settings(), workdir, path)
    assert not path.exists()


def summed(x, y, reverse=False):
    return jax.lax.scan(lambda c, row: (c * x[:, 1] + row, c), x[:, 0], x.swapaxes(0, 1), reverse=reverse)


# Translations that samplers of DiG do not reach, on x [b, 4, 6] and labels y [b].
FUNCTIONS = {
    "scan": lambda x, y: summed(x, y)[0],
    "reverse scan": lambda x, y: summed(x, y, reverse=True)[1],
    "branches": lambda x, y: jax.lax.cond(y.sum() > 5, lambda: x * 2, lambda: x[:, ::-1] - 1),
    "batched product": lambda x, y: jnp.einsum("bij,bkj->bki", x, jnp.sin(x)),
    "other product": lambda x, y: jnp.einsum("bij,ik->bjk", x, jnp.arange(8.0).reshape(4, 2)),
    "rows": lambda x, y: jnp.arange(24.0).reshape(6, 4)[y],
    "window, clamped": lambda x, y: jax.lax.dynamic_slice_in_dim(x, y.sum(), 3, axis=1),
    "window of everything": lambda x, y: jax.lax.dynamic_slice_in_dim(x, y.sum(), 6, axis=2),
    "strides": lambda x, y: jax.lax.slice_in_dim(jax.lax.slice_in_dim(x, 1, 4, 2, 1), 0, 6, 3, 2),
    "parts": lambda x, y: jnp.unstack(x, axis=1)[2] - jnp.unstack(x, axis=1)[0],
    "sums": lambda x, y: jnp.cumsum(x, 1) + jax.lax.cumsum(x, 2, reverse=True) + x.max(1, keepdims=True),
    "softmax": lambda x, y: jax.nn.softmax(x) + jax.nn.gelu(x) + jnp.clip(x, -0.5, 0.5) + x**3,
    "choices": lambda x, y: jnp.where(x != jnp.round(x, 1), jnp.expm1(-jnp.abs(x)), jnp.sign(x)),
    "reshape": lambda x, y: jnp.concatenate([x.reshape(-1, 6), jnp.ones((2 * x.shape[0], 6))]).sum(0),
    "bits": lambda x, y: jnp.where((y % 2 == 0) & ~(y > 3), jnp.float32(1), jnp.log1p(jnp.float32(y))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_graph_computes_what_the_function_does(name):
    (b,) = jax.export.symbolic_shape("b")
    specs = {"x": jax.ShapeDtypeStruct((b, 4, 6), jnp.float32), "y": jax.ShapeDtypeStruct((b,), jnp.int32)}
    model = to_onnx(FUNCTIONS[name], specs, "z")
    runner = session(model.SerializeToString())
    for size in (1, 3):
        x = np.random.default_rng(size).standard_normal((size, 4, 6), np.float32)
        y = np.arange(3, 3 + size, dtype=np.int32)
        inputs = {node.name: {"x": x, "y": y}[node.name] for node in runner.get_inputs()}
        np.testing.assert_allclose(runner.run(["z"], inputs)[0], FUNCTIONS[name](x, y), rtol=2e-6, atol=2e-6)


def test_a_primitive_without_a_translation_is_named():
    x = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(UnsupportedError, match="got JAX's primitive 'sort', which has no translation"):
        to_onnx(jnp.sort, {"x": x}, "y")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model__depth": 9, "model__directions": 4},
        {
            "model__name": "U-DiG-S",
            "model__depth": 5,
            "model__num_heads": 2,
            "data__options": {"image_size": 8},
        },
        {"model__name": "DiT-S/2", "sampling__guidance_interval": (0.2, 0.7)},
        {"model__dtype": "bfloat16"},
        {"diffusion__process": "flow", "sampling__sampler": "heun", "sampling__guidance": "cfg_zero"},
        {"diffusion__process": "flow", "sampling__sampler": "unipc", "sampling__guidance": "apg"},
        {"sampling__cache_interval": 2, "sampling__sampler": "dpmpp_2m"},
    ],
    ids=["groups of blocks", "u-dig", "dit", "bfloat16", "cfg_zero", "apg", "cache"],
)
def test_models_guidance_and_samplers(changes, tmp_path):
    options = tiny_settings().data.options | changes.get("data__options", {})
    settings = tiny_settings(**GUIDED | changes | {"data__options": options})
    write_checkpoint(tmp_path / "run", settings)
    export(settings, tmp_path / "run", tmp_path / "x.onnx")
    sampler = in_float32(dig_jax.load(tmp_path / "run", settings=settings))
    assert_draws_the_same(tmp_path / "x.onnx", sampler, np.arange(5), guidance_scale=2.0)
