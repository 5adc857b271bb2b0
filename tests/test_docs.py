"""The documentation: its links, its site, its reference of public names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from public_modules import MODULES

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md", "kernels/*.md", "kernels/benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]+`")
LINK = re.compile(
    r"(?:\]\(|src=\"|href=\"|^\[[^]]+\]: )(?!https?:|mailto:)([^)\s#\"]*)(?:#([^)\s\"]+))?(?=[)\"\s])",
    re.MULTILINE,
)
RELEASE = re.compile(
    r"""pip3? install [^`\n]*?(?<=[ '"])(?:dig[-_]jax|pallas[-_]gla)(?:\[[^]]+\])?(?! @|[-/\w[])""",
    re.IGNORECASE,
)
NAMES = [
    f"{module.__name__}.{name}"
    for module in MODULES
    for name in module.__all__
    if f"{module.__name__}.{name}" not in sys.modules
]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").strip().lower()
        slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    assert broken_links(ROOT / page) == []


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead to no file or no heading."""
    broken = []
    for path, anchor in LINK.findall(CODE.sub("", FENCED.sub("", page.read_text()))):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}" if anchor else path)
    return broken


def test_the_check_of_links_finds_headings_as_github_names_them(tmp_path):
    (tmp_path / "page.md").write_text("# A `b` & c's [d](e)\n```\n# no heading\n```\n## F\n## F\n")
    assert anchors(tmp_path / "page.md") == {"a-b--cs-d", "f", "f-1"}


def test_the_check_of_links_reads_all_their_forms(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '# A\n[`x`](a.md), [x](b.md "B"), [x](#a), [x](#c), [x](https://x.org), `[x](d.md)`\n'
        '<img src="e.png"> <a href="f.md">x</a>, [x](page.md#a)\n\n[x]: g.md\n'
    )
    assert broken_links(page) == ["a.md", "b.md", "#c", "e.png", "f.md", "g.md"]


def test_packages_are_installed_from_a_clone_or_from_git():
    """PyPI has no release of either package."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in files.stdout.split("\0"):
        if Path(name).suffix in (".md", ".py", ".ipynb", ".toml", ".txt", ".yml"):
            assert not RELEASE.search((ROOT / name).read_text()), name


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        *((name, True) for name in ("dig-jax", "dig_jax", "'DiG-JAX[demo]'", "-U pallas-gla==0.1")),
        *((name, False) for name in ("'dig-jax[demo] @ git+URL'", "./dig-jax", "-e dig_jax/", "dig-jax-x")),
    ],
)
def test_the_check_of_installations_finds_releases(arguments, found):
    for program in ("pip", "pip3", "uv pip", "%pip"):
        assert bool(RELEASE.search(f"{program} install {arguments}\n")) == found


def test_decisions_count_the_lines_that_the_files_have():
    text = (ROOT / "docs/concepts/decisions.md").read_text()
    counts = [
        (names, n) for names, n in re.findall(r"^\| [^|]*\((`[^|)]*)\) \| (\d+) \|", text, re.MULTILINE)
    ]
    counts += [(names, n) for n, names in re.findall(r"(\d+) lines: (`[^`]*`)", text)]
    assert len(counts) == 15
    for names, stated in counts:
        found = [lines_of(name) for name in re.findall("`(.*?)`", names)]
        assert all(found), names
        assert int(stated) == pytest.approx(sum(sum(found, [])), rel=0.1), names


def lines_of(pattern: str) -> list[int]:
    """Return the numbers of lines of files below the repository or the package."""
    files = [*ROOT.glob(pattern), *(ROOT / "dig_jax").glob(pattern)]
    return [len(path.read_text().splitlines()) for path in files]


def lines_of_functions(code: str) -> dict[str, int]:
    """Return the greatest number of lines of the functions of each name, without their docstrings."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            ignored = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            lines = node.end_lineno - node.lineno + 1 - ignored
            found[node.name] = max(lines, found.get(node.name, 0))
    return found


def test_files_and_functions_are_as_short_as_contributing_says():
    parts = ("dig_jax", "kernels/pallas_gla", "configs")
    files = {path: path.read_text() for part in parts for path in ROOT.glob(f"{part}/**/*.py")}
    files[ROOT / "main.py"] = (ROOT / "main.py").read_text()
    assert [path for path, code in files.items() if len(code.splitlines()) > 400] == []
    functions = {
        (path.name, name): n for path, c in files.items() for name, n in lines_of_functions(c).items()
    }
    assert len(functions) > 1000
    long = {function for function, lines in functions.items() if lines > 60}
    assert not long


def test_the_lines_of_a_function_are_counted_without_its_docstring():
    code = 'class A:\n    def f(\n        x\n    ):\n        """One.\n\n        Two."""\n        return x\n'
    assert lines_of_functions(code) == {"f": 4}


def test_pages_agree_on_the_plans_that_they_share():
    tables = [
        {
            (cells[0].strip("`").replace(".py:", ":"), cells[1].strip("`")): [cells[3], cells[4], cells[5]]
            for line in (ROOT / "docs/guide" / page).read_text().splitlines()
            if len(cells := line.strip("| ").split(" | ")) == 8
        }
        for page in ("plan.md", "pods.md")
    ]
    shared = tables[0].keys() & tables[1].keys()
    assert len(shared) > 2
    assert {key: tables[1][key] for key in shared} == {key: tables[0][key] for key in shared}


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_describes_every_public_name(name):
    pages = [ROOT / "docs" / "reference" / page for page in ("api.md", "pallas_gla_api.md")]
    assert f"::: {name}\n" in "".join(page.read_text() for page in pages)


@pytest.mark.parametrize("page", ["concepts/how_dig_works", "guide/kernel", "guide/from_fla"])
def test_the_examples_of_a_page_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / f"docs/{page}.md").read_text(), re.M | re.S)
    assert blocks
    exec("\n".join(blocks), {})


def test_the_site_is_deployed_by_the_documented_commands():
    workflow = (ROOT / ".github/workflows/docs.yml").read_text()
    for command in ("npm install --no-save onnxruntime-web@1.30.0", "mkdocs build --strict"):
        assert f"      - run: {command}\n" in workflow
        assert f"    {command}\n" in (ROOT / "docs/guide/browser.md").read_text()


def test_the_site_builds_without_warnings_and_loads_nothing_from_other_servers(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs pip install -e '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {"NO_MKDOCS_2_WARNING": "1", "PATH": str(Path(sys.executable).parent)}
    result = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html")}
    assert len(pages) > 20
    loaded = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?https?:|<link[^>]*stylesheet[^>]*https?:"
        r"|data-md-component=\"?source\b"  # asks GitHub's API
    )
    assert [path.name for path, text in pages.items() if loaded.search(text)] == []
    assert [path.name for path, text in pages.items() if "arithmatex" in text] == []  # no raw formulas
    formulas = [formula for text in pages.values() for formula in re.findall("<math.*?</math>", text, re.S)]
    assert len(formulas) > 10
    assert [formula for formula in formulas if "&amp;" in formula or "\\" in formula] == []
