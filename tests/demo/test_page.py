"""The page in Chromium."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import chromium_page
from PIL import Image

from dig_jax.checkpoints.description import config_and_versions
from dig_jax.files.atomic import write_json
from dig_jax.testing import tiny_settings, write_checkpoint

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page():
    """A page of Chromium, which must not load anything from elsewhere."""
    with chromium_page(viewport={"width": 1280, "height": 900}) as page:
        yield page


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a demo in its own process."""
    pytest.importorskip("gradio", reason="pip install -e '.[demo]'")
    workdir = tmp_path_factory.mktemp("run")
    settings = tiny_settings(sampling__steps=5)
    write_checkpoint(workdir, settings)
    write_json(workdir / "config.json", config_and_versions(settings))
    command = [sys.executable, "main.py", f"--config={workdir}/config.json", "--mode=demo", "--port=0"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                break
        else:
            raise AssertionError("".join(lines))
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, process.stderr.read()


def test_a_visitor_searches_a_class_sees_its_images_and_downloads_them(page, url, tmp_path):
    foreign = []
    page.on("request", lambda sent: foreign.append(sent.url) if not sent.url.startswith(url) else None)
    page.goto(url)
    page.click("#class input")
    page.keyboard.press("Control+a")
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    page.click("#generate")
    page.wait_for_selector("#stage details")
    images = page.locator("#stage img")
    assert images.count() == 4
    assert images.first.evaluate("image => image.complete && image.naturalWidth") == 4
    assert '"class": 3' in page.locator("#stage pre").text_content()
    page.wait_for_selector("#gallery img")
    with page.expect_download() as download:
        page.get_by_text("Download settings").click()
    settings = json.loads(Path(download.value.path()).read_text())["settings"]
    assert settings["class"] == 3 and settings["seeds"] == [0, 1, 2, 3]
    with page.expect_download() as download:
        page.get_by_text("Download images").click()
    shutil.unpack_archive(download.value.path(), tmp_path, "zip")
    image = Image.open(tmp_path / "3_2.png")
    assert json.loads(image.text["dig_jax"])["settings"] == settings | {"seeds": [2]}
    assert [name for name in foreign if not name.startswith(("data:", "blob:"))] == []


def test_a_mistake_in_the_form_is_shown_as_one_sentence(page, url):
    page.goto(url)
    page.wait_for_selector("#seed input")
    page.fill("#seed input", "2147483647")
    page.click("#generate")
    page.wait_for_selector("text=expected 1 to 8 integers from 0 to 2147483647")
