"""What --mode=doctor says about this machine, and about machines with problems."""

import os
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from jax_options import jax_options

from dig_jax import runtime
from dig_jax.config import Config
from dig_jax.doctor import doctor, kernels, machine
from dig_jax.errors import UserError
from dig_jax.testing import tiny_settings


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError(OSError(113, "No route to host"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def test_the_model_and_the_data_of_a_config_are_checked(tmp_path, capsys):
    doctor.doctor(tiny_settings(), tmp_path)
    text = capsys.readouterr().out
    assert "training examples of fake: 4 × 4 × 1, 5 classes" in text
    assert "  DiG-S/2   GLA runs 'cpu'\n" in text
    assert "triton: implementation='triton' does not run on this platform: got cpu; expected cuda\n" in text
    assert "xla: runs too, with --config.model.implementation=xla\n" in text
    assert " devices   " in text and f"free in {tmp_path}" in text
    assert "https://huggingface.co cannot be reached (No route to host); " in text
    assert not any(line.startswith("!") for line in text.splitlines())


def test_without_a_config_the_published_models_are_checked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "default_model", lambda name: machine.Finding.of(f"checked {name}"))
    doctor.doctor(Config(), tmp_path)
    text = capsys.readouterr().out
    assert "checked DiG-XL/2" in text and "checked DiT-XL/2" in text


def test_a_model_without_gla_says_how_it_mixes_tokens(monkeypatch):
    settings = tiny_settings(model__name="DiT-S/2")
    assert kernels.model(settings).lines == ("plain JAX; the model has no GLA",)
    monkeypatch.setattr(kernels, "_lower", lambda *_: "stablehlo.custom_call @tpu_custom_call(%1)")
    assert kernels.model(settings).lines == ("JAX's splash attention; the model has no GLA",)
    settings = tiny_settings(model__name="DiS-S/2", model__depth=2, model__num_heads=None)
    assert kernels.model(settings).lines == ("the kernel of the selective scan; the model has no GLA",)


def test_a_check_that_fails_is_one_line_and_the_others_run(tmp_path, capsys):
    settings = tiny_settings(data__name="image_folder", data__options={"path": str(tmp_path / "images")})
    with pytest.raises(UserError, match="1 problem; see the lines that start with !"):
        doctor.doctor(settings, tmp_path)
    text = capsys.readouterr().out
    assert "! data      " in text and "no such directory: " in text
    assert "GLA runs 'cpu'" in text and " network " in text


def test_a_chip_that_jax_does_not_use_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(machine, "_DRIVERS", {"gpu": (str(tmp_path / "nvidia0"), "cuda")})
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    finding = machine.devices()
    assert finding.is_problem
    assert finding.lines[-1] == "there is a GPU that JAX does not use: JAX_PLATFORMS=cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "pip install -e '.[gpu]'" in machine.devices().lines[-1]


def test_no_device_is_a_problem(monkeypatch):
    def fail():
        raise UserError("JAX found no device")

    monkeypatch.setattr(runtime, "require_devices", fail)
    assert machine.devices() == machine.Finding.problem("JAX found no device")


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_problems(monkeypatch, tmp_path):
    usage = types.SimpleNamespace(free=500_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(machine.shutil, "disk_usage", lambda _: usage)
        finding = machine.disk(tmp_path / "run")
        assert finding.is_problem and finding.lines[0].startswith(f"500 MB free in {tmp_path}; ")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert machine.disk(tmp_path).lines == (f"cannot write to {tmp_path}; choose another --workdir",)
    with jax_options(jax_compilation_cache_dir=str(tmp_path)):
        assert machine.cache().is_problem


def test_the_cache_tells_its_size_or_that_there_is_none(tmp_path):
    (tmp_path / "program").write_bytes(bytes(2_000_000))
    with jax_options(jax_compilation_cache_dir=str(tmp_path)):
        assert machine.cache().lines == (f"{tmp_path}: compiled programs take 2 MB in 1 files",)
    with jax_options(jax_compilation_cache_dir=""):
        assert "are not kept" in machine.cache().lines[0]


def test_versions_that_do_not_fit_are_a_problem(monkeypatch):
    assert not machine.program().is_problem
    monkeypatch.setattr(machine, "_version", lambda name: {"jax": "0.10.2"}.get(name, "0.9"))
    finding = machine.program()
    assert finding.is_problem and finding.lines[-1].startswith("jax and jaxlib differ")


def test_the_network_is_tried_unless_it_is_switched_off(monkeypatch):
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer())
    assert machine.network().lines[0].startswith("https://huggingface.co answers in ")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert machine.network().lines == ("not tried: HF_HUB_OFFLINE is set",)


def test_extras_that_are_missing_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(machine, "_EXTRAS", {"hub": ("os", "shards"), "demo": ("no_such_module", "a page")})
    first, second = machine.extras().lines
    assert first == "installed: hub"
    assert second.startswith("not installed: demo (a page); pip install -e '.[demo]'")


def test_every_optional_package_is_an_extra():
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert set(machine._EXTRAS) <= set(project["optional-dependencies"])
