import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys
from dig_jax.streams import prepare_streams
prepare_streams()
file = open(sys.argv[1], "w")
assert file.fileno() > 2
os.write(1, b"from a library, to stdout")
os.write(2, b"from a library, to stderr")
print("\\xe9\\u2026")
print("\\xe9\\u2026", file=sys.stderr)
"""


def started(code, redirections="", **environment):
    """Run Python code in a shell with redirections; return its status and output."""
    command = f'"$0" "$@" {redirections}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    arguments = ["sh", "-c", command, sys.executable, *code]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("redirections", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_is_written_to_a_closed_stream_ends_in_no_file(tmp_path, redirections):
    status, stdout, stderr = started(["-c", PROGRAM, str(tmp_path / "file")], redirections)
    assert (status, (tmp_path / "file").read_bytes()) == (0, b"")
    assert not (stdout and ">&-" in redirections.replace("2>&-", ""))
    assert not (stderr and "2>&-" in redirections)


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_characters_that_a_stream_cannot_show_are_replaced(tmp_path, environment):
    status, stdout, stderr = started(["-c", PROGRAM, str(tmp_path / "file")], **environment)
    assert status == 0
    assert stdout.endswith(b"?\n")
    assert b"\\u2026" in stderr


@pytest.mark.parametrize("program", [["main.py"], ["-m", "dig_jax.convert"]])
def test_help_and_errors_do_not_depend_on_the_streams(program):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    status, stdout, stderr = started([*program, "--help"], PYTHONIOENCODING="ascii", **environment)
    assert (status, stderr) == (0, b"")
    assert b"--" in stdout
    assert started([*program, "--help"], ">&-", **environment) == (0, b"", b"")
    status, stdout, stderr = started([*program, "--nothing"], "2>&-", **environment)
    assert (status, stdout, stderr) == (2, b"", b"")


@pytest.mark.parametrize("program", [["main.py"], ["-m", "dig_jax.convert"]])
def test_a_program_whose_output_nobody_reads_ends_quietly(program):
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    status, _, stderr = started([*program, "--help"], "| true", **environment)
    assert (status, stderr) == (0, b"")


def test_a_broken_pipe_that_is_not_standard_output_is_an_error():
    program = "from dig_jax.streams import ending_with_reader as e\nwith e(): raise BrokenPipeError"
    _, _, stderr = started(["-c", program], "| cat")
    assert b"BrokenPipeError" in stderr
