"""The JSON API over HTTP."""

import base64
import http.client
import io
import json
import threading
import time

import numpy as np
import pytest
from demo_server import serving
from PIL import Image

from dig_jax.demo.drawing import Drawer
from dig_jax.testing import PlainModel


def images_of(answer):
    return [Image.open(io.BytesIO(base64.b64decode(image["png"]))) for image in answer["images"]]


def test_the_api_draws_the_images_of_the_sampler_and_says_how(running):
    wanted = {"class": 3, "seeds": [5, 2], "guidance_scale": 1.5, "steps": 2}
    status, answer = running.ask("POST", "/api/images", wanted)
    assert status == 200
    assert answer["settings"] == wanted | {"sampler": "ddim", "size": 4}
    assert answer["model"] == {"name": "DiG-S/2", "data": "fake", "step": 7}
    expected = running.sampler(3, seeds=[5, 2], guidance_scale=1.5, steps=2)
    for seed, image, drawn in zip([5, 2], images_of(answer), expected, strict=True):
        assert np.abs(np.asarray(image).astype(int) - drawn[..., 0]).max() <= 1
        described = json.loads(image.text["dig_jax"])
        assert described == {"model": answer["model"], "settings": answer["settings"] | {"seeds": [seed]}}
        again = running.ask("POST", "/api/images", described["settings"])[1]
        np.testing.assert_array_equal(images_of(again)[0], image)


def test_the_menu_names_what_a_request_may_have(running):
    status, menu = running.ask("GET", "/api/menu")
    assert status == 200
    assert menu["classes"] == ["0", "1", "2", "3", "4"] and "ddim" in menu["samplers"]
    assert running.ask("POST", "/api/images", {"class": 4} | menu["defaults"])[0] == 200


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        ({"class": 9}, {}, 400, "invalid class: got class 9; expected a name or an index from 0 to 4"),
        ({"class": 0, "steps": 10**9}, {}, 400, "invalid steps: got 1000000000; expected 2, 5, 10"),
        ({"class": 0, "seeds": list(range(9))}, {}, 400, "invalid seeds: got [0, 1, "),
        (b"{", {}, 400, "invalid JSON; expected an object such as "),
        (b"[1]", {}, 400, "invalid JSON; expected an object such as "),
        (b'{"class": 0, "guidance_scale": NaN}', {}, 400, "invalid JSON; expected"),
        (b"[" * 10000, {}, 400, "invalid JSON; expected"),
        (b"\xff\xfe", {}, 400, "invalid JSON; expected"),
        (b" " * 20000, {}, 413, "the request is too large; expected at most 16384 bytes"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "invalid Content-Type; expected application/json"),
    ],
)
def test_an_invalid_request_is_answered_with_one_sentence(running, body, headers, status, message):
    answered, answer = running.ask("POST", "/api/images", body, **headers)
    assert answered == status
    assert list(answer) == ["error"] and answer["error"].startswith(message)


def test_a_request_for_another_host_is_refused(running):
    """A page of another site could otherwise read the answers through a name of its own."""
    assert running.ask("GET", "/api/status", Host="example.com")[0] == 400


@pytest.fixture
def gate(monkeypatch):
    """An event that each batch waits for."""
    opened = threading.Event()
    draw = Drawer.__call__

    def waiting(drawer, *arguments):
        assert opened.wait(20)
        return draw(drawer, *arguments)

    monkeypatch.setattr(Drawer, "__call__", waiting)
    yield opened
    opened.set()


def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_beyond_the_queue_are_refused_and_late_ones_time_out(plain_sampler, gate):
    with serving(plain_sampler, max_waiting=3, timeout=1.5) as demo:
        answers = []

        def ask(count):
            answers.append(demo.ask("POST", "/api/images", {"class": 0, "seeds": list(range(count))}))

        threads = [threading.Thread(target=ask, args=[3]) for _ in range(2)]
        threads[0].start()
        until(lambda: demo.ask("GET", "/api/status")[1]["drawing"] == 3)
        threads[1].start()
        until(lambda: demo.ask("GET", "/api/status")[1]["waiting"] == 3)
        status, answer = demo.ask("POST", "/api/images", {"class": 0})
        assert (status, answer["error"]) == (503, "the queue is full: 3 images wait; try again later")
        for thread in threads:
            thread.join()
        assert [status for status, _ in answers] == [504, 504]
        assert answers[0][1]["error"] == "no images within 1.5 s; ask for fewer images or steps"
        assert demo.ask("GET", "/api/status")[1]["waiting"] == 0
        gate.set()


def test_images_of_a_client_that_leaves_are_dropped(plain_sampler, gate):
    body = b'{"class": 0, "seeds": [0, 1, 2]}'
    with serving(plain_sampler) as demo:
        connections = [http.client.HTTPConnection(*demo.address) for _ in range(2)]
        for connection in connections:
            connection.request("POST", "/api/images", body, {"Content-Type": "application/json"})
            until(lambda: demo.ask("GET", "/api/status")[1]["drawing"] == 3)
        until(lambda: demo.ask("GET", "/api/status")[1]["waiting"] == 3)
        connections[1].close()
        until(lambda: demo.ask("GET", "/api/status")[1]["waiting"] == 0)
        gate.set()
        assert connections[0].getresponse().status == 200
        connections[0].close()
        assert demo.ask("GET", "/api/status")[1]["drawn"] == 3


def test_a_failed_batch_is_one_sentence_and_the_demo_goes_on(plain_sampler, monkeypatch):
    def denoise(*_):
        raise RuntimeError("no luck\nat all")

    with serving(plain_sampler) as demo:
        with monkeypatch.context() as patch:
            patch.setattr(PlainModel, "denoise", denoise)
            status, answer = demo.ask("POST", "/api/images", {"class": 0, "sampler": "heun"})
        assert status == 500
        assert answer == {"error": "the images could not be drawn: RuntimeError: no luck"}
        assert demo.ask("POST", "/api/images", {"class": 0})[0] == 200
