"""The JSON API on a free port, and a client of it."""

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest

from dig_jax.demo.drawing import Drawer
from dig_jax.demo.engine import Engine
from dig_jax.demo.service import Service


class Demo:
    """A running demo.

    Attributes:
        address: (host, port).
        sampler: the model.
    """

    def __init__(self, sampler, address):
        self.sampler, self.address = sampler, address

    @property
    def url(self):
        return "http://{}:{}".format(*self.address)

    def ask(self, method, path, body=None, **headers):
        """Return the status and the JSON of an answer; `body` is JSON or bytes."""
        connection = http.client.HTTPConnection(*self.address, timeout=120)
        with contextlib.closing(connection):
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text.decode()


@contextlib.contextmanager
def serving(sampler, *, max_waiting=64, timeout=60.0):
    """Yield the JSON API, in a thread. Gradio leaves event loops open, so the page needs a process."""
    uvicorn = pytest.importorskip("uvicorn", reason="pip install -e '.[demo]'")
    from dig_jax.demo.app import create_app

    drawer = Drawer(sampler, batch_size=4)
    engine = Engine(drawer, batch_size=4, max_waiting=max_waiting)
    app = create_app(Service(drawer, engine, timeout))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.02)
            yield Demo(sampler, listener.getsockname()[:2])
        finally:
            server.should_exit = True
            thread.join(30)
            engine.close()
        assert not thread.is_alive()
