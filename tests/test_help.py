"""The text of --help."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dig_jax import program
from dig_jax.cli import command_line, commands, help
from dig_jax.cli.flags import define_flags
from dig_jax.cli.main import main

ROOT = Path(__file__).parent.parent


def test_help_shows_modes_flags_and_examples():
    command = [sys.executable, "main.py", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    words = ("python main.py --config=configs/digits.py", "--workdir", "--config.FIELD=VALUE")
    for word in (
        *words,
        *commands.COMMANDS,
        *(f"--{name}" for row in commands.COMMANDS.values() for name in row.flags),
    ):
        assert word in result.stdout


@pytest.mark.parametrize("mode", commands.COMMANDS)
def test_the_help_of_a_mode_explains_its_flags_and_its_examples_parse(mode, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dig-jax"])
    monkeypatch.chdir(ROOT)
    row, values = commands.COMMANDS[mode], define_flags()
    text = help.text([f"--mode={mode}", "--help"], values)
    assert row.summary in text and row.examples
    for name in row.flags:
        assert re.search(rf"^  --{name} +\w", text, re.MULTILINE)
    shown = " ".join(text.partition("\nFlags:\n")[2].split())
    for name in row.flags:
        described = " ".join(values[name].help.split())
        for modes, said in re.findall(r"With --mode=([^:]*): (.+?)(?= With --|$)", described):
            said = said[:1].upper() + said[1:]
            assert (said in shown) == (mode in re.findall(r"\w+", modes)), (name, said)
    for example in row.examples:
        assert f"  dig-jax {example}\n" in text
        values = define_flags()
        command_line._parse(["dig-jax", *example.split()], values)
        assert values.mode == mode
        commands._check_flags(values, mode)


def test_the_help_of_a_flag_names_all_modes_that_take_it():
    values = define_flags()
    for name in {name for row in commands.COMMANDS.values() for name in row.flags}:
        if texts := re.findall("With --mode=([^:]*):", values[name].help):
            named = set(re.findall(r"\w+", " ".join(texts))) & set(commands.COMMANDS)
            assert named == {mode for mode, row in commands.COMMANDS.items() if name in row.flags}, name


def test_lines_that_tell_to_start_again_name_the_program_that_was_started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--a"])
    assert program.restart() == ["python", "main.py", "--a"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/dig-jax", "--a"])
    assert program.restart() == ["dig-jax", "--a"]


def test_the_installed_program_imports_from_the_current_directory(monkeypatch, tmp_path, capsys):
    """As Python does for main.py: configs import from the package beside them."""
    (tmp_path / "settings.py").write_text("from configs.smoke import get_config\n")
    (tmp_path / "mine.py").write_text("from settings import get_config\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(command_line, "start_logging", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dig-jax", "--config=mine.py", "--labels=3"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("error: --labels does not apply to --mode=train")
