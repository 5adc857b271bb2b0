"""200 clients at once."""

import base64
import io
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from demo_server import serving
from PIL import Image

from dig_jax import Sampler
from dig_jax.demo.drawing import Drawer
from dig_jax.testing import random_params, tiny_components

INVALID = [
    {"class": 9},
    {"class": "cat"},
    {"class": 0, "steps": 10**6},
    {"class": 0, "steps": "2"},
    {"class": 0, "size": 4096},
    {"class": 0, "seeds": list(range(1000))},
    {"class": 0, "seeds": [-1]},
    {"class": 0, "guidance_scale": 1e9},
    {"class": 0, "sampler": "dopri5"},
    {"class": 0, "stepz": 2},
    [0],
    b"{" * 1000,
    b" " * 10**6,
]


def wanted(draw: random.Random):
    return {
        "class": draw.randrange(5),
        "seeds": [draw.randrange(2**31) for _ in range(draw.randint(1, 3))],
        "guidance_scale": draw.choice([1, 1.5, 4.2]),
        "steps": draw.choice([2, 5]),
        "sampler": draw.choice(["ddim", "dpmpp_2m"]),
    }


def memory() -> int:
    """Return the bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.slow
def test_of_200_concurrent_requests_none_is_lost_or_crossed_and_memory_is_bounded():
    components = tiny_components(sampling__steps=2)
    sampler = Sampler(components, random_params(components), step=7)
    draw = random.Random(0)
    with serving(sampler, max_waiting=100, timeout=300.0) as demo:

        def patient(body):
            """Ask again while the queue is full."""
            while True:
                try:
                    status, answer = demo.ask("POST", "/api/images", body)
                except (BrokenPipeError, ConnectionResetError):  # too large: answered before it was read
                    return 413, {"error": "the request is too large"}
                if status != 503:
                    return status, answer
                refused.append(body)
                time.sleep(0.2)

        def wave():
            """Send 200 requests, a quarter of them invalid; return them with their answers."""
            bodies = [draw.choice(INVALID) if draw.random() < 0.25 else wanted(draw) for _ in range(200)]
            answers = [None] * len(bodies)

            def ask(index):
                answers[index] = patient(bodies[index])

            threads = [threading.Thread(target=ask, args=[index]) for index in range(len(bodies))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return list(zip(bodies, answers, strict=True))

        refused = []
        first = wave()
        used = memory()
        second = wave()
        assert memory() - used < 100e6
    assert refused  # the queue was full, at least once
    alone = Drawer(sampler, batch_size=4)
    counts = {"valid": 0, "invalid": 0}
    for body, (status, answer) in first + second:
        if any(body is invalid for invalid in INVALID):
            counts["invalid"] += 1
            assert 400 <= status < 500 and answer["error"] and "\n" not in answer["error"]
            continue
        counts["valid"] += 1
        assert status == 200, answer
        request = alone.menu.read(body)
        assert [image["seed"] for image in answer["images"]] == body["seeds"]
        for seed, image in zip(body["seeds"], answer["images"], strict=True):
            expected = alone(request.program, [request.label], [seed], [request.guidance_scale], None)[0]
            drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["png"]))))
            np.testing.assert_array_equal(drawn, expected[..., 0])
    assert min(counts.values()) > 50
