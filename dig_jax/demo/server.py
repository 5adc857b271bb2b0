"""The server of a demo: uvicorn with the JSON API and the page in one app."""

import contextlib
import logging
import socket

import gradio as gr
import uvicorn
from fastapi import FastAPI

from dig_jax.demo.app import create_app
from dig_jax.demo.drawing import Drawer
from dig_jax.demo.engine import Engine
from dig_jax.demo.page import STYLE, THEME, create_page
from dig_jax.demo.service import Service
from dig_jax.sampling.sampler import Sampler

log = logging.getLogger(__name__)

_MAX_CONNECTIONS = 1000
# Seconds that open connections of pages delay the end.
_GRACE = 2


def serve(
    sampler: Sampler,
    listener: socket.socket,
    *,
    batch_size: int,
    timeout: float,
    max_waiting: int,
    local: bool,
) -> None:
    """Serve until Ctrl-C.

    Args:
        sampler: the model.
        listener: a listening socket.
        batch_size: images of each batch.
        timeout: seconds until a request is given up.
        max_waiting: images in the queue.
        local: as for `create_app`.
    """
    drawer = Drawer(sampler, batch_size)
    engine = Engine(drawer, batch_size=batch_size, max_waiting=max_waiting)
    service = Service(drawer, engine, timeout)
    menu = drawer.menu
    engine.submit(menu.read({"class": 0} if menu.class_names else {}))  # compiles before somebody waits
    host, port = listener.getsockname()[:2]
    log.info(
        "%s of step %d: http://%s:%d and its JSON API, http://%s:%d/api/menu; Ctrl-C ends the demo",
        service.model["name"],
        sampler.step,
        *(f"[{host}]" if ":" in host else host, port) * 2,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            with_page(create_app(service, local=local), service),
            log_level="warning",
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE,
        )
    )
    try:
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    finally:
        engine.close()


def with_page(app: FastAPI, service: Service) -> FastAPI:
    """Return the app with the page at its root."""
    return gr.mount_gradio_app(
        app,
        create_page(service),
        path="/",
        theme=THEME,
        css=STYLE,
        footer_links=[],
        max_file_size="1kb",  # nothing is uploaded
        ssr_mode=False,
        show_error=True,
    )
