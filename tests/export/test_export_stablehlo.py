"""The sampler as a StableHLO program."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ended_runs import environment
from tiny_autoencoder import write_autoencoder

import dig_jax
from dig_jax import ConfigError, UserError
from dig_jax.export.export import export
from dig_jax.testing import tiny_settings, write_checkpoint

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "export.md"
GUIDED = {"sampling__steps": 3, "sampling__guidance_scale": 2.0}


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """A file with a scale of guidance as input, which tests must not change."""
    path = tmp_path_factory.mktemp("exported") / "digits.stablehlo"
    export(tiny_settings(**GUIDED), workdir, path)
    return path


def fresh_process(code, cwd):
    """Run code in a new process that cannot import this package."""
    blocked = "import sys\nsys.modules |= dict.fromkeys(['dig_jax', 'pallas_gla', 'flax', 'configs'])\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=cwd, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_documented_snippet_draws_the_same_pixels_in_a_process_without_this_package(workdir, exported):
    (snippet,) = re.findall(r"```python\n(import json.*?)```", GUIDE.read_text(), re.S)
    call = "draw(parameters, np.int32([3, 1, 4]), np.int32([0, 1, 2])"
    assert call + ")" in snippet
    snippet = snippet.replace(call, call + ", np.float32(1.5)")
    fresh_process(snippet + "\nnp.save('images.npy', images)\nprint(about['inputs'])", exported.parent)
    sampler = dig_jax.load(workdir, settings=tiny_settings(**GUIDED))
    expected = sampler([3, 1, 4], seeds=[0, 1, 2], guidance_scale=1.5)
    np.testing.assert_array_equal(np.load(exported.parent / "images.npy"), expected)


def read(path):
    """Return the program, what the file says about it, and its parameters."""
    file = dict(np.load(path))
    about = json.loads(str(file.pop("about")))
    return jax.export.deserialize(bytearray(file.pop("program"))), about, file


def test_the_file_describes_itself_and_runs_on_each_platform_with_any_batch_size(exported):
    program, about, parameters = read(exported)
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert about["inputs"] == ["parameters", "labels", "seeds", "guidance_scale"]
    assert (about["step"], about["ema"], about["config"]["sampling"]["steps"]) == (7, "0.9", 3)
    assert about["images"]["image_shape"] == [4, 4, 1]
    assert about["versions"]["jax"] == jax.__version__
    assert "model.blocks.rest.0.mixer.q_proj.kernel" in parameters
    labels, seeds = program.in_avals[-3:-1]
    assert str(labels.shape) == str(seeds.shape) == str(program.out_avals[0].shape[:1]) == "(b,)"


def test_the_same_export_again_writes_nothing_and_another_one_is_refused(workdir, exported, caplog):
    caplog.set_level("INFO")
    before = exported.read_bytes(), exported.stat().st_mtime_ns
    export(tiny_settings(**GUIDED), workdir, exported)
    assert f"{exported} already holds the sampler of step 7 (0.9)" in caplog.messages
    for changes in ({"sampling__ema": "params"}, {"sampling__guidance_scale": 1.0}):
        with pytest.raises(ConfigError, match=f"--output={exported} exists and holds something else"):
            export(tiny_settings(**GUIDED | changes), workdir, exported)
    assert (exported.read_bytes(), exported.stat().st_mtime_ns) == before


def test_a_missing_package_and_a_kernel_of_one_platform_are_one_line(workdir, tmp_path, monkeypatch):
    settings = tiny_settings(model__implementation="triton")
    write_checkpoint(tmp_path / "run", settings)
    with pytest.raises(UserError, match="no portable form .*'triton' does not run on this platform"):
        export(settings, tmp_path / "run", tmp_path / "x.stablehlo")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match=r"needs the package flatbuffers: pip install -e '.\[export\]'"):
        export(tiny_settings(), workdir, tmp_path / "x.stablehlo")
    assert not (tmp_path / "x.stablehlo").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {
            "model__name": "U-DiG-S",
            "model__depth": 5,
            "model__num_heads": 2,
            "data__options": {"image_size": 8},
        },
        {"model__name": "DiS-S/2", "model__depth": 2},
        {
            "model__name": "DiT-S/2",
            "sampling__guidance_interval": (0.2, 0.7),
            "sampling__guidance_scale": 2.0,
        },
        {"diffusion__process": "flow", "sampling__sampler": "dopri5", "sampling__guidance": "perturbed"},
        {"sampling__cache_interval": 2, "sampling__sampler": "dpmpp_2m", "sampling__uint8": "truncate"},
        # 144 tokens, which a CPU scans token by token for few images only.
        {"data__options": {"image_size": 24}},
    ],
    ids=["u-dig", "dis", "dit", "dopri5", "cache", "144 tokens"],
)
def test_every_model_and_sampler_is_exported_bit_for_bit(changes, tmp_path):
    options = tiny_settings().data.options | changes.get("data__options", {})
    settings = tiny_settings(**changes | {"data__options": options})
    write_checkpoint(tmp_path / "run", settings)
    export(settings, tmp_path / "run", tmp_path / "x.stablehlo")
    program, about, parameters = read(tmp_path / "x.stablehlo")
    scale = [np.float32(settings.sampling.guidance_scale)] if "guidance_scale" in about["inputs"] else []
    sampler = dig_jax.load(tmp_path / "run", settings=settings)
    labels, seeds = np.int32([1, 2, 3]), np.int32([5, 0, 7])
    images = jax.jit(program.call)(parameters, labels, seeds, *scale)
    np.testing.assert_array_equal(images, sampler(labels, seeds=seeds))


@pytest.mark.slow
def test_the_program_of_a_latent_model_decodes(tmp_path):
    settings = tiny_settings(
        autoencoder__path=str(write_autoencoder(tmp_path / "vae")),
        data__options=tiny_settings().data.options | {"channels": 4},
        sampling__steps=2,
    )
    write_checkpoint(tmp_path / "run", settings)
    export(settings, tmp_path / "run", tmp_path / "x.stablehlo")
    program, _, parameters = read(tmp_path / "x.stablehlo")
    images = np.asarray(program.call(parameters, np.int32([1, 2]), np.int32([5, 0]), np.float32(1.5)))
    expected = dig_jax.load(tmp_path / "run", settings=settings)([1, 2], seeds=[5, 0], guidance_scale=1.5)
    assert images.shape == expected.shape and np.ptp(expected) > 9
    assert np.abs(images.astype(int) - expected).max() <= 1
