"""The page that draws digits in the reader's browser."""

import functools
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from chromium import chromium_page
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from dig_jax.sampling.generate import noise

DOCS = Path(__file__).parents[1] / "docs"
RUNTIME = DOCS.parent / "node_modules/onnxruntime-web/dist"


FILES = {20: "digits.onnx", 1: "digits_one_step.onnx"}


def drawn(labels, seeds, steps=20):
    """The images of the page's model in Python."""
    start = np.asarray(noise(jnp.int32(seeds), jnp.int32(0), (8, 8, 1)))
    session = onnxruntime.InferenceSession(DOCS / "browser" / FILES[steps])
    inputs = {"labels": np.int32(labels), "noise": start}
    if steps == 1:
        inputs["guidance_scale"] = np.asarray(1, np.float32)
    return session.run(["images"], inputs)[0]


@pytest.mark.parametrize("steps", FILES)
def test_a_classifier_recognizes_the_digits_of_the_page(steps):
    images, classes = load_digits(return_X_y=True)
    labels = np.arange(30) % 10
    generated = drawn(labels, np.arange(30), steps).reshape(30, -1)
    found = SVC(C=10).fit(images / 8 - 1, classes).predict(generated)
    assert (found == labels).sum() >= 27


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def url(tmp_path):
    """The address of the page without its text, on a server of its own."""
    if not RUNTIME.exists():
        pytest.skip("npm install --no-save onnxruntime-web@1.30.0")
    shutil.copytree(DOCS / "browser", tmp_path / "browser")
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
        shutil.copy(RUNTIME / name, tmp_path / "browser")
    (html,) = re.findall(r"<div id.*</script>", (DOCS / "guide/browser.md").read_text(), re.S)
    (tmp_path / "guide").mkdir()
    (tmp_path / "guide" / "browser.html").write_text(f'<meta charset="utf-8">{html}')
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/guide/browser.html"
        server.shutdown()


@pytest.fixture
def page():
    with chromium_page() as page:
        yield page


@pytest.mark.slow
def test_the_page_draws_what_python_draws_and_asks_no_other_server(page, url):
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)

    def images(labels, seed, steps=20):
        """Wait for these digits; return the page's numbers and what Python draws."""
        state = f"document.getElementById('digits').dataset.state == '{labels} {seed} {steps}'"
        page.wait_for_function(state)
        found = np.array(page.evaluate("document.getElementById('digits').dataset.images").split(","), float)
        classes = [int(label) for label in labels.split(",")]
        return found.reshape(-1, 8, 8, 1), drawn(classes, [seed] * len(classes), steps)

    np.testing.assert_allclose(*images("0,1,2,3,4,5,6,7,8,9", 0), atol=1e-4)
    page.select_option("select[name=label]", "7")
    page.fill("input[name=seed]", "2147483646")
    np.testing.assert_allclose(*images("7", 2147483646), atol=1e-4)
    page.click("button[name=next]")
    found, expected = images("7", 2147483647)
    np.testing.assert_allclose(found, expected, atol=1e-4)

    page.select_option("select[name=steps]", "1")
    found, expected = images("7", 2147483647, steps=1)
    np.testing.assert_allclose(found, expected, atol=1e-4)

    assert "1 digit in" in page.inner_text("#digits output")
    pixels = "Array.from(document.querySelector('canvas').getContext('2d').getImageData(16, 16, 1, 1).data)"
    gray = int(np.clip(np.round((found[0, 0, 0, 0] + 1) * 127.5), 0, 255))
    assert page.evaluate(pixels) == [gray, gray, gray, 255]
    assert not errors
    assert all(request.startswith(url.removesuffix("guide/browser.html")) for request in requests)
