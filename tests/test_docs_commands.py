"""Every command of the documentation is one that this code accepts, or says what it needs.

Commands of main.py and of the converter are parsed with the real flags and configs, without running them.
Commands that no test machine can run are marked in the block, in the paragraph before it or at the top of
the page: "needs the network", "needs an accelerator".
"""

import re
import shlex
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
    + tuple(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")))
]
MARK = re.compile(r"[Nn]eeds?\s+(?:an\s+accelerator|the\s+network)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```|((?:^    [^\n]*\n)+)", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(?:python|pip|mkdocs|dig-jax|\.ci/\w+|git|curl|gcloud|kubectl|srun)\b")
# Configs whose runs take hours on a chip.
LARGE = re.compile(
    r"configs/(?:(?:dig|dit|udig|dis)_\w+|lightningdit|jit|cifar10|celeba64|imagefolder(?:_latents)?)\."
)
EXTRA = re.compile(r"[a-z]+(?=[,\]])")
INSTALLED = {
    extra
    for text in re.findall(r"-e '(.*?)'", (ROOT / ".ci" / "run").read_text())
    for extra in EXTRA.findall(text)
}
# Tests or CI run these: they build the site, run pytest, compare the generated pages, and ask a demo.
RUN = (
    ["curl", "http://127.0.0.1:7860/api/images"],
    ["mkdocs"],
    [".ci/run"],
    ["python", "-m", "pytest"],
    ["python", "-m", "dig_jax.config.reference"],
    ["python", "-m", "configs.published"],
    ["pip", "install", "-r", "requirements.txt"],
)


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


def check_main(arguments: list[str], config_json: Path) -> None:
    """Parse flags and config as main.py does, and run nothing. `config_json` stands for any run's."""
    arguments = [re.sub(r"^--config=.*\.json$", f"--config={config_json}", each) for each in arguments]
    values = define_flags()
    command_line._parse(["main.py", *arguments], values)
    commands._check_flags(values, values.mode)


def is_exercised(words: list[str], config_json: Path) -> bool:
    """Return whether a command is run or checked; raise if its flags, its config or its file are wrong."""
    if any(words[: len(known)] == known for known in RUN):
        return True
    if words[0].endswith("python") and words[1] == "main.py":
        check_main(words[2:], config_json)
    elif words[0] == "dig-jax":
        check_main(words[1:], config_json)
    elif words[:3] == ["python", "-m", "dig_jax.convert"]:
        convert._parser().parse_args(words[3:])
    elif words[:3] == ["python", "-m", "benchmarks.compare"]:
        compare.make_parser().parse_args(words[3:])
    elif words[0] == "python" and words[1].endswith(".py"):
        return (ROOT / words[1]).exists() or (ROOT / "kernels" / words[1]).exists()
    else:
        return words[:3] == ["pip", "install", "-e"] and set(EXTRA.findall(words[3])) <= INSTALLED
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
            if not (marked and "main.py" not in text):
                wrong.append(f"{page}:{number}: {text}: {error}")
    assert not wrong, "\n".join(wrong)


def test_the_check_finds_commands_marks_and_mistakes(config_json, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = "# P\n\n## A\nNeeds the network.\n\n```bash\ncurl\n```\n\nT:\n\n    python main.py --a # c\n"
    page = page.replace("--a", "\\\n        --a")  # a line that goes on
    curl, main = commands_of(page)
    assert curl == (6, "curl", True)
    assert (main.marked, parts(main.text)) == (False, [["python", "main.py", "--a"]])
    assert not is_exercised(["curl", "-O", "x"], config_json)
    assert not is_exercised(["pip", "install", "-e", ".[latents]"], config_json)
    assert not is_exercised(["python", "benchmarks/no_such_file.py"], config_json)
    assert parts('on_all "cd dig && .venv/bin/python main.py --config=configs/dig_s.py"')[0][1] == "main.py"
    assert needs_mark(["python", "main.py", "--config=configs/dig_s.py"])
    with pytest.raises(command_line.ConfigError, match="wdth"):
        is_exercised(
            ["python", "main.py", "--config=configs/digits.py", "--config.model.wdth=3"], config_json
        )
    with pytest.raises(command_line.ConfigError, match="seeds"):
        is_exercised(["dig-jax", "--config=configs/digits.py", "--seeds=3"], config_json)
