import dataclasses
import functools
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from aiohttp import ClientError

from configs import smoke
from dig_jax import config, runtime
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.cli import command_line, commands, help
from dig_jax.cli.flags import define_flags
from dig_jax.errors import CheckpointError, ConfigError
from dig_jax.files import hub
from dig_jax.files.atomic import write_json

ROOT = Path(__file__).parent.parent
SMOKE = "--config=configs/smoke.py"
FLAGS = sorted({name for command in commands.COMMANDS.values() for name in command.flags})


@pytest.fixture
def command(monkeypatch, capsys):
    """A function that runs a command line with a main function and returns (exit status, stderr)."""

    def run(*arguments, main=lambda settings, workdir: None):
        values = define_flags()
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        try:
            main_of = functools.partial(main, values) if main is commands.run else main
            command_line.run(main_of, help.text, values)
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    # These change the whole process.
    for name in (
        "prepare_cpu",
        "disable_llvm_symbolizer",
        "enable_compilation_cache",
        "raise_lost_interrupts",
    ):
        monkeypatch.setattr(runtime, name, lambda *_: None)
    monkeypatch.setattr(commands, "_join_processes", lambda values: None)
    monkeypatch.setattr(command_line, "start_logging", lambda: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.chdir(ROOT)
    return run


@pytest.mark.parametrize("flag", FLAGS)
def test_a_mode_refuses_flags_of_others_and_names_their_modes(command, monkeypatch, flag):
    started = []
    table = {
        mode: dataclasses.replace(row, run=lambda *_, mode=mode: started.append(mode))
        for mode, row in commands.COMMANDS.items()
    }
    monkeypatch.setattr(commands, "COMMANDS", table)
    accepting = [mode for mode, row in table.items() if flag in row.flags]
    assert accepting
    for mode in table:
        status, stderr = command(SMOKE, f"--mode={mode}", f"--{flag}=1", main=commands.run)
        assert status == (0 if mode in accepting else 2)
        if mode not in accepting:
            assert stderr.startswith(f"error: --{flag} does not apply to --mode={mode}; expected --mode=")
            assert all(name in stderr.partition("expected")[2] for name in accepting)
    assert started == accepting


@pytest.fixture
def broken_config(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "missing --config; expected a config file, such as --config=configs/digits.py"),
        (
            ["--config=configs/smok.py"],
            "no such config file: 'configs/smok.py'; did you mean 'configs/smoke.py'?",
        ),
        (["--config=configs"], "no such config file: 'configs'"),
        (["--config=configs/smoke.py:512"], "configs/smoke.py takes no argument"),
        (["--config=tests/golden/config.json:512"], "tests/golden/config.json takes no argument"),
        (["--config=configs/dig_xl.py:big"], "invalid resolution 'big'; expected 256, 512 or 1024"),
        ([SMOKE, "--config.traning.steps=3"], "unknown field config.traning; did you mean 'training'?"),
        ([SMOKE, "--config.training.step=3"], "unknown field config.training.step; did you mean 'steps'?"),
        ([SMOKE, "--config.seed.x=1"], "unknown field config.seed.x"),
        ([SMOKE, "--config.data.options.size=3"], "unknown field config.data.options.size"),
        (
            [SMOKE, "--config.sampling.sampler_options.eta"],
            "missing value of config.sampling.sampler_options.eta; expected",
        ),
        ([SMOKE, "--config.sampling.sampler_option.eta=1"], "did you mean 'sampler_options'?"),
        ([SMOKE, "--noconfig.model.lern_sigma"], "did you mean 'learn_sigma'?"),
        ([SMOKE, "--config.model=3"], "flag --config.model=3: Failed to parse '3'"),
        (
            [SMOKE, "--config.training.steps=1.5"],
            "--config.training.steps=1.5: invalid literal for int()",
        ),
        ([SMOKE, "--config.model.learn_sigma=perhaps"], "--config.model.learn_sigma=perhaps: "),
        ([SMOKE, "--config.seed"], "Missing value for flag --config.seed"),
        ([SMOKE, "--mode=trian"], "invalid --mode='trian'; expected train, sample, "),
        ([SMOKE, "--mode=trian"], "; did you mean 'train'?"),
        (["--mode=trian", "--help"], "invalid --mode='trian'; expected train, sample, "),
        ([SMOKE, "--mod=train"], "unknown flag --mod; did you mean '--mode'?"),
        ([SMOKE, "--lables=3"], "unknown flag --lables; did you mean '--labels'?"),
        ([SMOKE, "sample"], "unexpected argument 'sample'; did you mean --mode=sample?"),
        ([SMOKE, "7"], "unexpected argument '7'; flags start with --"),
        (
            [SMOKE, "--config.data.batch_size=0"],
            "invalid config.data.batch_size=0; expected a positive",
        ),
    ],
)
def test_an_invalid_command_line_prints_one_line_and_exits_with_2(command, arguments, message):
    status, stderr = command(*arguments)
    assert status == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1
    assert message in stderr


def test_an_export_needs_a_file_to_write(command):
    status, stderr = command(SMOKE, "--mode=export", main=commands.run)
    assert (status, stderr.partition(", FILE")[0]) == (
        2,
        "error: missing --output; expected --output=FILE.safetensors",
    )


def test_a_config_file_that_raises_gives_one_line(command, broken_config):
    status, stderr = command(f"--config={broken_config}")
    assert (status, stderr) == (2, f"error: --config={broken_config}: ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [SMOKE, "--config.training.steps=7", "--config.training.ema_decays=0.5", "--noconfig.data.flip"],
        ["--config", "configs/smoke.py", "--config.training.steps", "7", "--mode=sample"],
        ["--config.training.steps=7", "-config=configs/dig_xl.py:512"],
    ],
)
def test_fields_are_set_in_every_spelling_that_absl_accepts(command, arguments):
    seen = []
    status, stderr = command(*arguments, main=lambda *given: seen.append(given))
    assert (status, stderr) == (0, "")
    settings, workdir = seen[0]
    assert settings.training.steps == 7
    assert workdir.parts[0] == "runs" and workdir.name in " ".join(arguments)
    if workdir.name == "dig_xl":
        assert settings.data.options["image_size"] == 64


def test_options_of_samplers_and_guidance_rules_are_set_by_flags(command):
    seen = []
    arguments = [
        "--config.sampling.sampler_options.eta=0.5",
        "--config.sampling.sampler_options.form=sigma",
        "-config.sampling.sampler_options.s_max=inf",
        "--config.sampling.guidance_options.blocks=[1,2]",
        "--config.sampling.guidance_options.norm_cap=None",
        "--config.sampling.steps=3",
    ]
    status, stderr = command(SMOKE, *arguments, main=lambda *given: seen.append(given))
    assert (status, stderr) == (0, "")
    sampling = seen[0][0].sampling
    assert sampling.sampler_options == {"eta": 0.5, "form": "sigma", "s_max": math.inf}
    assert sampling.guidance_options == {"blocks": [1, 2], "norm_cap": None} and sampling.steps == 3


def test_the_config_json_of_a_run_also_sets_the_workdir(command, tmp_path):
    settings = config.from_dict(smoke.get_config().to_dict())
    write_json(tmp_path / "config.json", config_and_versions(settings))
    seen = []
    path = f"--config={tmp_path}/config.json"
    status, stderr = command(path, "--config.sampling.steps=7", main=lambda *given: seen.append(given))
    assert (status, stderr) == (0, "")
    sampling = dataclasses.replace(settings.sampling, steps=7)
    assert seen == [(dataclasses.replace(settings, sampling=sampling), tmp_path)]
    (tmp_path / "config.json").write_text("{}")
    status, stderr = command(path)
    assert status == 2 and stderr.startswith(f"error: cannot read {tmp_path}/config.json: ")


def test_paths_of_flags_are_expanded_and_checked(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_json(tmp_path / "config.json", config_and_versions(config.Config()))
    seen = []
    table = {"train": commands.Command(lambda settings, workdir, _: seen.append(workdir))}
    monkeypatch.setattr(commands, "COMMANDS", table)
    assert command("--config=~/config.json", "--workdir=~/runs/x", main=commands.run) == (0, "")
    assert command("--config=~/config.json", main=commands.run) == (0, "")
    assert seen == [tmp_path / "runs" / "x", tmp_path]
    for workdir in ("http://host/run", "a\0b"):
        status, stderr = command(SMOKE, f"--workdir={workdir}", main=commands.run)
        assert status == 2 and stderr.count("\n") == 1 and "expected" in stderr


def test_only_modes_that_read_a_model_take_one_of_the_hub(command, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda repository, file: tmp_path / repository / file)
    seen = []
    table = {
        mode: dataclasses.replace(row, run=lambda settings, workdir, _: seen.append(workdir))
        for mode, row in commands.COMMANDS.items()
    }
    monkeypatch.setattr(commands, "COMMANDS", table)
    for mode in ("sample", "evaluate", "export", "demo"):
        arguments = SMOKE, f"--mode={mode}", "--workdir=hf://someone/digits"
        assert command(*arguments, main=commands.run) == (0, "")
    assert seen == [tmp_path / "someone/digits/model.safetensors"] * 4
    status, stderr = command(SMOKE, "--workdir=hf://someone/digits", main=commands.run)
    assert (status, stderr.count("\n")) == (2, 1) and "unsupported path: got hf://someone/digits" in stderr


def test_a_config_file_may_have_a_colon_in_its_path(command, tmp_path):
    folder = tmp_path / "a:b"
    folder.mkdir()
    (folder / "x.py").write_text((ROOT / "configs" / "smoke.py").read_text())
    seen = []
    status, stderr = command(f"--config={folder}/x.py", main=lambda *given: seen.append(given))
    assert (status, stderr) == (0, "")
    assert seen[0][1] == Path("runs/x")


def raising(error):
    def main(settings, workdir):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("config.x is wrong"), 2, "config.x is wrong"),
        (CheckpointError("no\nsuch file"), 1, "no such file"),
        (
            OSError(28, "No space left on device", "w/a.png"),
            1,
            "No space left on device: w/a.png",
        ),
        (OSError("no data"), 1, "no data"),
        (ClientError("refused"), 1, "cannot use object storage: ClientError: refused"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume"),
    ],
)
def test_errors_that_the_user_can_fix_are_one_line(command, error, status, line):
    assert command(SMOKE, main=raising(error)) == (status, f"error: {line}\n")


def test_a_lack_of_device_memory_is_one_line_that_says_what_to_reduce(command):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore")
    status, stderr = command(SMOKE, main=raising(error))
    assert status == 1 and stderr.count("\n") == 1
    assert stderr.startswith("error: out of device memory; reduce config.data.batch_size or ")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("None", "get_config returned NoneType; expected an ml_collections.ConfigDict"),
        ("{'seed': 1}", "get_config returned dict; expected an ml_collections.ConfigDict"),
        ("__import__('sys').exit(0)", "SystemExit: 0"),
    ],
)
def test_a_config_file_that_returns_no_config_gives_one_line(command, tmp_path, returned, message):
    path = tmp_path / "odd.py"
    path.write_text(f"def get_config():\n    return {returned}\n")
    status, stderr = command(f"--config={path}")
    assert status == 2 and message in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("data.batch_size", 2**31, "at most 2³¹ - 1"),
        ("optimizer.warmup_steps", 2**31, "at most 2³¹ - 1"),
        ("model.depth", 10**23, "at most 2³¹ - 1, or 0"),
        ("sampling.images_per_class", 10**23, "at most 2³¹ - 1"),
        ("mesh.cpu_devices", 10**23, "a number from 1 to 1024"),
        ("mesh.data", 10**23, "at most 2³¹ - 1"),
        ("optimizer.learning_rate", "inf", "a positive number"),
        ("optimizer.learning_rate", "1e39", "at most the largest float32"),
        ("optimizer.weight_decay", "1e308", "at most the largest float32"),
        ("optimizer.b1", 1, "a number from 0 to less than 1, as float32"),
        ("optimizer.b2", "0.99999999", "a number from 0 to less than 1, as float32"),
        ("model.implementation", "cuda", "auto, reference, xla, triton or mosaic"),
    ],
)
def test_numbers_that_programs_cannot_compute_with_are_refused(command, field, value, expected):
    status, stderr = command(SMOKE, f"--config.{field}={value}")
    assert status == 2 and stderr.count("\n") == 1
    assert stderr.startswith(f"error: invalid config.{field}=") and f"; expected {expected}" in stderr


def test_an_implementation_that_does_not_run_here_is_one_line(command, tmp_path):
    arguments = [SMOKE, f"--workdir={tmp_path}/run", "--config.model.implementation=triton"]
    status, stderr = command(*arguments, "--config.mesh.data=1", main=commands.run)
    assert status == 2
    assert stderr.splitlines()[-1].startswith(
        "error: config.model.implementation: implementation='triton' does not run on this platform: got cpu"
    )


def test_main_py_runs_twice_in_one_process(monkeypatch, capsys):
    """As with %run in a notebook."""
    monkeypatch.setattr(command_line, "start_logging", lambda: None)
    monkeypatch.chdir(ROOT)
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["main.py", SMOKE, "--labels=3"])
        with pytest.raises(SystemExit):
            runpy.run_path("main.py", run_name="__main__")
        assert capsys.readouterr().err.startswith("error: --labels does not apply to --mode=train")


def test_a_bug_keeps_its_traceback(command):
    with pytest.raises(ZeroDivisionError):
        command(SMOKE, main=raising(ZeroDivisionError()))


def main_py(*arguments, **variables) -> subprocess.CompletedProcess:
    command, env = [sys.executable, str(ROOT / "main.py"), *arguments], os.environ | variables
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


@pytest.mark.parametrize(
    ("variable", "value", "status", "message"),
    [
        ("JAX_PLATFORMS", "cuda", 1, "JAX found no device for JAX_PLATFORMS=cuda: "),
        ("JAX_ENABLE_X64", "maybe", 2, "invalid environment variable: "),
    ],
)
def test_an_environment_that_jax_cannot_use_is_one_line(tmp_path, variable, value, status, message):
    result = main_py("--config=configs/smoke.py", f"--workdir={tmp_path}/run", **{variable: value})
    assert result.returncode == status, result.stderr
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_doctor_needs_no_config(command):
    seen = []
    for mode in (["--mode=doctor"], ["--mode", "doctor"]):
        status, stderr = command(*mode, main=lambda *given: seen.append(given))
        assert (status, stderr) == (0, "") and seen.pop()[0] == config.Config()
        status, stderr = command(*mode, SMOKE, main=lambda *given: seen.append(given))
        assert (status, stderr) == (0, "") and seen.pop()[0].data.name == "fake"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--mode=sample"], 1, "no checkpoint in "),
        (["--labels=3"], 2, "--labels does not apply to --mode=train; expected --mode=sample"),
        (
            ["--mode=export"],
            2,
            "missing --output; expected --output=FILE.safetensors, FILE.stablehlo, FILE.onnx",
        ),
    ],
)
def test_a_process_that_fails_prints_one_line_and_leaves_no_workdir(tmp_path, arguments, status, message):
    result = main_py("--config=configs/smoke.py", f"--workdir={tmp_path}/run", *arguments)
    assert result.returncode == status
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
