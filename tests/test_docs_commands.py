"""Every command of the documentation is one that this code accepts, or says what it needs.

Commands of main.py, the converter and the scripts are parsed with the real flags and configs, without running
them. Inside a sentence, so are those with arguments.
Commands that no test machine can run are marked in the block, in the paragraph before it or at the top of
the page: "needs the network", "needs an accelerator".
"""

import argparse
import functools
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.compare import __main__ as compare
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.cli import command_line, commands
from dig_jax.cli.flags import define_flags
from dig_jax.config import Config
from dig_jax.convert import command as convert
from dig_jax.files.atomic import write_json

ROOT = Path(__file__).parent.parent
PAGES = [
    Path(name)
    for name in ("README.md", "CONTRIBUTING.md", "kernels/README.md", "benchmarks/README.md")
    + ("kernels/benchmarks/README.md",)
    + tuple(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")))
]
MARK = re.compile(r"[Nn]eeds?\s+(?:an\s+accelerator|the\s+network)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```|((?:^    [^\n]*\n)+)", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(?:python|pip|mkdocs|dig-jax|\.ci/\w+|git|curl|gcloud|kubectl|srun)\b")
# Configs whose runs take hours on a chip.
LARGE = re.compile(
    r"configs/(?:(?:dig|dit|udig|dis)_\w+|lightningdit|jit|cifar10|celeba64|imagefolder(?:_latents)?)\."
)
INLINE = re.compile(r"`(python(?:\s+-m)?\s+(?!-m\s)[^`\s]+\s[^`]+|dig-jax\s[^`]+)`")
EXTRA = re.compile(r"[a-z]+(?=[,\]])")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
INSTALLED = {
    extra
    for text in re.findall(r"-e '(.*?)'", (ROOT / ".ci" / "run").read_text())
    for extra in EXTRA.findall(text)
}
# Tests or CI run these: they build the site, run pytest, and compare the generated pages.
RUN = (
    "mkdocs build --strict",
    "mkdocs serve",
    ".ci/run",
    "python -m pytest -n auto --dist=loadfile",
    "python -m pytest -m slow",
    "python -m dig_jax.config.reference",
    "python -m configs.published",
    "pip install -r requirements.txt",
)


class Parsed(BaseException):
    """A script has parsed its arguments."""


class Command(NamedTuple):
    """A command line of a page, and whether a mark says what it needs."""

    line: int
    text: str
    marked: bool


def commands_of(text: str) -> list[Command]:
    """Return the commands in the fenced and indented blocks of a page."""
    found = []
    page_marked = MARK.search(text.split("\n## ")[0]) is not None
    for block in BLOCK.finditer(text):
        if block[1] not in (None, "", "bash"):
            continue
        body = block[2] or block[3] or ""
        before = text[: block.start()].rstrip().rsplit("\n\n", 1)[-1]
        marked = page_marked or MARK.search(before + body) is not None
        number = text[: block.start()].count("\n") + 1
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            if PROGRAM.match(line.strip()) or ("python main.py" in line and line[0] != "#"):
                found.append(Command(number, line.strip(), marked))
    prose = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for span in INLINE.finditer(prose):
        command = re.sub(r"\[(--.*?)\]", r"\1", " ".join(span[1].split()))  # options may be in brackets
        found.append(Command(prose[: span.start()].count("\n") + 1, command, True))
    return found


def parts(text: str) -> list[list[str]]:
    """Return the words of each command of a line; a main.py inside quotes, as for ssh, counts as its own."""
    if "python main.py" in text and not PROGRAM.match(text):
        text = re.sub(r"[\"'](?=$| )", "", text[text.index("python main.py") :])
    found: list[list[str]] = [[]]
    for word in shlex.split(text.replace("…", ""), comments=True):
        if word in ("&&", "|", ";", "&") or word.startswith((">", "2>")):
            found.append([])
        else:
            found[-1].append(word)
    return [each for each in found if each]


@functools.cache
def check_main(arguments: tuple[str, ...], config_json: Path) -> None:
    """Parse flags and config as main.py does, and run nothing. `config_json` stands for any run's."""
    arguments = [re.sub(r"^--config=.*\.json$", f"--config={config_json}", each) for each in arguments]
    values = define_flags()
    command_line._parse(["main.py", *arguments], values)
    commands._check_flags(values, values.mode)


def check_script(script: str, arguments: list[str]) -> None:
    """Import a script and what it needs, and parse its arguments as it does."""
    path = ROOT / script

    def parse(parser, parse=argparse.ArgumentParser.parse_args):
        parse(parser)
        raise Parsed

    parses = re.search(r"argparse|arguments\(", path.read_text())
    assert parses or not any(argument.startswith("--") for argument in arguments), f"{script} has no flags"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [str(path), *arguments])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        try:
            runpy.run_path(str(path), run_name="__main__" if parses else "imported")
        except Parsed:
            parses = None
    assert not parses, f"{script} did not parse its arguments"


def is_exercised(words: list[str], config_json: Path) -> bool:
    """Return whether a command is run or checked; raise if its flags, its config or its file are wrong."""
    match words:
        case [("python" | ".venv/bin/python"), "main.py", *arguments] | ["dig-jax", *arguments]:
            if arguments != ["--help"]:
                check_main(tuple(arguments), config_json)
        case ["python", "-m", "dig_jax.convert", *arguments]:
            convert._parser().parse_args(arguments)
        case ["python", "-m", "benchmarks.compare", *arguments]:
            compare.make_parser().parse_args(arguments)
        case ["python", "-m", "pytest", *arguments, file] if file.startswith("tests/"):
            return (ROOT / file).exists() and arguments in ([], ["-m", "slow"])
        case ["python", "docs/guide/draw_faces.py", "faces"]:  # its packages are in no extra
            return True
        case ["python", script, *arguments] if script.endswith(".py"):
            check_script(script, arguments)
        case ["pip", "install", "-e", package]:
            extras = set(EXTRA.findall(package))
            assert package.startswith(".[") and extras <= EXTRAS.keys(), f"no package: {package}"
            return extras <= INSTALLED
        case _:
            return " ".join(words) in RUN
    return True


def needs_mark(words: list[str]) -> bool:
    """Return whether a command of main.py computes for hours without an accelerator."""
    return LARGE.search(" ".join(words)) is not None and not {"--mode=plan", "--mode=doctor"} & set(words)


@pytest.fixture(scope="module")
def config_json(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "config.json"
    write_json(path, config_and_versions(Config()))
    return path


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_parses_or_says_what_it_needs(page, config_json, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = []
    for number, text, marked in commands_of((ROOT / page).read_text()):
        if "[--" in text:  # a template
            continue
        try:
            for words in parts(text):
                if (not is_exercised(words, config_json) or needs_mark(words)) and not marked:
                    wrong.append(f"{page}:{number}: not marked: {text}")
        except (Exception, SystemExit) as error:
            wrong.append(f"{page}:{number}: {text}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_check_finds_commands_marks_and_mistakes(config_json, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = "# P\n\n## A\nNeeds the network.\n\n```bash\ncurl\n```\n\nT:\n\n    python main.py --a # c\n"
    page = page.replace("--a", "\\\n        --a")  # a line that goes on
    curl, main = commands_of(page)
    assert curl == (6, "curl", True)
    assert (main.marked, parts(main.text)) == (False, [["python", "main.py", "--a"]])
    assert parts('on_all "cd dig && .venv/bin/python main.py --config=configs/dig_s.py"')[0][1] == "main.py"
    assert needs_mark(["python", "main.py", "--config=configs/dig_s.py"])
    assert commands_of("# P\n\nA\n`python a.py\n--b`, `[--c]`\n") == [(4, "python a.py --b", True)]
    assert is_exercised(["python", "benchmarks/latents.py", "--images=8"], config_json)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("curl -O x", None),
        ("pip install -e .[latents]", None),
        ("pip install -e .[latnts]", "latnts"),
        ("mkdocs buld", None),
        ("python -m pytest tests/test_no_such_file.py", None),
        ("python benchmarks/no_such_file.py", "no_such_file"),
        ("python benchmarks/latents.py --pictures=8", "--pictures=8"),
        ("python benchmarks/costs.py --a", "no flags"),
        ("python -m dig_jax.convert a b --c", "--c"),
        ("python main.py --config=configs/digits.py --config.model.wdth=3", "wdth"),
        ("dig-jax --config=configs/digits.py --seeds=3", "seeds"),
    ],
)
def test_the_check_refuses_mistakes_with_the_reason(command, reason, config_json, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    if reason is None:
        assert not is_exercised(command.split(), config_json)
    else:
        with pytest.raises((Exception, SystemExit)) as error:
            is_exercised(command.split(), config_json)
        assert reason in str(error.value) + capsys.readouterr().err
