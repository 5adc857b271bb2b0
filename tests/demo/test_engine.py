"""The engine with a function in place of a model; test_drawing.py has a model."""

import concurrent.futures
import threading

import numpy as np
import pytest

from dig_jax.demo.engine import Engine, QueueFull
from dig_jax.demo.request import ImageRequest, Program

SLOW, FAST = Program("ddim", 50, (8, 8), True), Program("ddim", 5, (8, 8), True)


def request(*seeds, program=FAST, label=0):
    return ImageRequest(label, seeds, 1.5, program)


class Gate:
    """Draws images of one pixel, their seeds; waits for `opened` before each batch."""

    def __init__(self):
        self.opened, self.begun = threading.Event(), threading.Event()
        self.batches = []

    def __call__(self, program, labels, seeds, scales, watch):
        self.batches.append((program, list(seeds)))
        self.begun.set()
        assert self.opened.wait(30)
        if -1 in seeds:
            raise RuntimeError("no image of seed -1")
        images = np.uint8(seeds)[:, None, None, None]
        if watch is not None:
            watch(1, images // 2)
        return images


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def engine(gate):
    engine = Engine(gate, batch_size=4, max_waiting=8)
    yield engine
    gate.opened.set()
    engine.close()


def images(job):
    return job.result.result(timeout=30).ravel().tolist()


def hold(gate, engine):
    """Return a job that keeps the engine busy until the gate opens."""
    job = engine.submit(request(0))
    assert gate.begun.wait(30)
    return job


def test_requests_that_wait_share_batches_by_program_in_order_of_arrival(gate, engine):
    first = hold(gate, engine)
    jobs = [
        engine.submit(request(*seeds, program=program))
        for seeds, program in (
            ((1, 2), SLOW),
            ((3,), FAST),
            ((4, 5, 6), SLOW),
            ((7,), FAST),
        )
    ]
    gate.opened.set()
    assert images(first) == [0]
    assert [images(job) for job in jobs] == [[1, 2], [3], [4, 5, 6], [7]]
    assert gate.batches == [(FAST, [0]), (SLOW, [1, 2, 4, 5]), (FAST, [3, 7]), (SLOW, [6])]
    assert (engine.drawn, engine.batches, engine.waiting) == (8, 4, 0)


def test_a_full_queue_refuses_requests_and_takes_them_again_when_others_are_cancelled(gate, engine):
    hold(gate, engine)
    jobs = [engine.submit(request(seed, seed)) for seed in range(4)]
    with pytest.raises(QueueFull, match="the queue is full: 8 images wait; try again later"):
        engine.submit(request(9))
    assert jobs[1].result.cancel()
    assert engine.waiting == 6
    last = engine.submit(request(9))
    gate.opened.set()
    assert images(last) == [9] and images(jobs[3]) == [3, 3]
    assert all(1 not in seeds for _, seeds in gate.batches)


def test_a_batch_that_fails_fails_its_requests_and_no_others(gate, engine):
    hold(gate, engine)
    failing, other = engine.submit(request(-1, 1)), engine.submit(request(2, program=SLOW))
    gate.opened.set()
    with pytest.raises(RuntimeError, match="no image of seed -1"):
        failing.result.result(timeout=30)
    assert images(other) == [2]


def test_a_request_that_is_cancelled_while_it_is_drawn_does_not_stop_the_engine(gate, engine):
    first = hold(gate, engine)
    assert first.result.cancel()
    gate.opened.set()
    assert images(engine.submit(request(5))) == [5]


def test_a_watched_job_sees_predictions_of_its_own_images(gate, engine):
    hold(gate, engine)
    engine.submit(request(10))
    job = engine.submit(request(20, 30), watched=True)
    seen = []
    draw = engine._draw

    def recording(*arguments):
        result = draw(*arguments)
        seen.append((job.evaluations, [int(frame.item()) for frame in job.frames]))
        return result

    engine._draw = recording
    gate.opened.set()
    assert images(job) == [20, 30]
    assert seen == [(1, [10, 15])]


def test_closing_cancels_what_waits_and_refuses_the_rest(gate, engine):
    first, second = hold(gate, engine), engine.submit(request(1))
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(concurrent.futures.CancelledError):
        second.result.result(timeout=30)
    gate.opened.set()
    closing.join(30)
    assert images(first) == [0]
    with pytest.raises(QueueFull):
        engine.submit(request(2))
