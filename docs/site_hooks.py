"""Hooks of `mkdocs build`: pages from outside docs/, links that leave docs/, and formulas as MathML.

GitHub shows the same files, so a page links to others by their path in the repository.
"""

import html
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

_ROOT = Path(__file__).parent.parent
_BLOB = "https://github.com/dig-jax/dig-jax/blob/main/"
# Files of the repository that are pages of the site: path in the repository -> path in the site.
_PAGES = {
    "benchmarks/README.md": "benchmarks/models.md",
    "kernels/benchmarks/README.md": "benchmarks/kernels.md",
    "kernels/README.md": "reference/pallas_gla.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
# ONNX Runtime for guide/browser.md, if `npm install` put it there.
_RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
_LINK = re.compile(r"(\]\(|^\[[\w-]+\]: )(?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?", re.MULTILINE)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Add the pages from outside docs/, and ONNX Runtime."""
    for source, target in _PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(_ROOT / source)))
    for name in _RUNTIME:
        if (path := _ROOT / "node_modules/onnxruntime-web/dist" / name).exists():
            files.append(File.generated(config, f"browser/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at pages of the site, or at GitHub where the site has no such page."""
    source = next((s for s, t in _PAGES.items() if t == page.file.src_uri), "docs/" + page.file.src_uri)

    def resolve(match):
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        target = _PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if target is None and (_ROOT / path).exists():
            return match[1] + _BLOB + path + (match[3] or "")
        if target is None:
            return match[0]  # a broken link, which the strict build reports
        here = posixpath.dirname(page.file.src_uri)
        return match[1] + posixpath.relpath(target, here or ".") + (match[3] or "")

    return _LINK.sub(resolve, markdown)


def on_page_content(content, page, config, files):
    """Render formulas as MathML, which browsers draw without scripts or fonts."""

    def render(match):
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return _FORMULA.sub(render, content)
