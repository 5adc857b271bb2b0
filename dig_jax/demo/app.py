"""The JSON API of a demo: FastAPI routes in front of the engine."""

import asyncio
import base64
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dig_jax.demo.engine import Job, Pixels, QueueFull
from dig_jax.demo.service import Service
from dig_jax.errors import one_line

_MAX_BODY = 16384
_BODY_SECONDS = 10.0
_NOT_JSON = 'invalid JSON; expected an object such as {"class": 3, "seeds": [0, 1]}'
# Seconds between two looks at whether a client is still there.
_POLL = 0.5
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Refused(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        message: one sentence for the client.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def create_app(service: Service, *, local: bool = True) -> FastAPI:
    """Return an app with the routes GET /api/menu, GET /api/status and POST /api/images.

    Args:
        service: what draws.
        local: only answer requests to a loopback address by name. Otherwise a web page could reach the demo
            through a name of its own that resolves to the loopback address.
    """
    app = FastAPI(title="DiG-JAX", docs_url=None, redoc_url=None, openapi_url=None)
    if local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(_LOOPBACK))

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 503 else None
        return JSONResponse({"error": error.message}, error.status, headers)

    @app.get("/api/menu")
    async def menu() -> dict[str, Any]:
        return service.menu.to_json() | {"model": service.model}

    @app.get("/api/status")
    async def status() -> dict[str, Any]:
        engine = service.engine
        numbers = {"drawing": engine.drawing, "drawn": engine.drawn, "batches": engine.batches}
        return {"waiting": engine.waiting} | numbers

    @app.post("/api/images")
    async def images(request: Request) -> dict[str, Any]:
        fields = await _fields(request)
        try:
            job = service.submit(fields)
        except QueueFull as error:
            raise Refused(503, str(error)) from error
        except ValueError as error:
            raise Refused(400, one_line(error)) from error
        pixels = await _result(job, request, service.timeout)
        return await run_in_threadpool(_answer, service, job, pixels)

    return app


def _answer(service: Service, job: Job, pixels: Pixels) -> dict[str, Any]:
    files = service.pictures(job.request, pixels)
    return {
        "settings": service.menu.describe(job.request),
        "model": service.model,
        "images": [
            {"seed": seed, "png": base64.b64encode(file).decode()}
            for seed, file in zip(job.request.seeds, files, strict=True)
        ],
    }


async def _result(job: Job, request: Request, seconds: float) -> Pixels:
    """Wait for the images of a job; cancel it if they take too long or the client leaves."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    result = asyncio.wrap_future(job.result)
    while True:
        await asyncio.wait({result}, timeout=min(_POLL, max(deadline - loop.time(), 0)))
        if result.done():
            break
        if loop.time() >= deadline or await request.is_disconnected():
            result.cancel()
            raise Refused(504, f"no images within {seconds:g} s; ask for fewer images or steps")
    if result.cancelled():
        raise Refused(503, "the demo is shutting down")
    if error := result.exception():
        raise Refused(500, f"the images could not be drawn: {one_line(error, name_type=True)}") from error
    return result.result()


async def _fields(request: Request) -> Mapping[str, Any]:
    """Return the JSON object in the body of a request.

    Raises:
        Refused: it is not JSON, too large or too slow.
    """
    # Browsers send other types to other sites without asking them first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "invalid Content-Type; expected application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_BODY:
                    raise Refused(413, f"the request is too large; expected at most {_MAX_BODY} bytes")
    except TimeoutError as error:
        raise Refused(408, f"the request did not arrive within {_BODY_SECONDS:g} s") from error
    try:
        fields = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, _NOT_JSON) from error
    if not isinstance(fields, dict):
        raise Refused(400, _NOT_JSON)
    return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
