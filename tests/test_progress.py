import io
import logging
import os
import pty
import re
import sys

import numpy as np
import pytest
import tqdm

from dig_jax import Sampler
from dig_jax.evaluation.evaluate import score
from dig_jax.progress import Progress, duration
from dig_jax.sampling.image_set import ImageSet
from dig_jax.testing import PlainComponents, tiny_settings

LINE = r"step 5/20, loss 0\.5, ETA \d+:\d\d"


@pytest.fixture
def clock(monkeypatch):
    """The time, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return now


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO, "dig_jax")
    return lambda: caplog.messages


def test_without_a_terminal_progress_is_logged(lines):
    with Progress("step", first=0, total=20) as line:
        line.show(5, "loss 0.5")
    assert re.fullmatch(LINE, lines()[0])


def test_progress_is_rewritten_in_place_on_a_terminal(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "dig_jax")
    monkeypatch.setenv("TERM", "xterm")
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress("step", first=4, total=20) as line:
            line.show(5, "loss 0.5")
            line.show(5, "loss 0.5")
        shown = ""
        while not shown.endswith("\n"):
            shown += os.read(controller, 1000).decode()
    os.close(controller)
    assert re.fullmatch(rf"(\r{LINE} *)+\r\n", shown)
    assert not caplog.messages


def test_a_dumb_terminal_gets_lines_without_escape_codes(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "dig_jax")
    monkeypatch.setenv("TERM", "dumb")
    controller, terminal = pty.openpty()
    with open(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress("step", first=4, total=20) as line:
            line.show(5, "loss 0.5")
        stderr.write("end")
    assert os.read(controller, 1000) == b"end"
    os.close(controller)
    assert re.fullmatch(LINE, caplog.messages[0])


def test_the_remaining_time_follows_from_the_rate_since_this_start(lines, clock):
    with Progress("step", first=1000, total=4000) as line:
        clock[0] += 30
        line.show(1010)  # 3 seconds per step
    assert lines() == ["step 1010/4000  3.00s/step, ETA 2:29:30"]


def test_the_log_gets_few_lines_and_always_the_last_one(lines, clock):
    with Progress("image", first=0, total=5, every_seconds=10.0) as line:
        for image in range(1, 6):
            clock[0] += 6
            line.show(image)
    assert [text.split()[1].strip(",") for text in lines()] == ["1/5", "3/5", "5/5"]


def interrupt(*_, **__):
    raise KeyboardInterrupt


def draw(sampler, folder):
    ImageSet(folder / "set.npz", sampler, np.arange(3), np.arange(3)).draw(index=0, count=1)


@pytest.mark.parametrize("work", [score, draw])
def test_work_that_fails_ends_its_line(work, tmp_path, monkeypatch):
    """An open line would push the next one down while a traceback is kept."""
    before = set(tqdm.tqdm._instances)
    settings = tiny_settings(data__name="digits", data__options={}, evaluation__num_images=40)
    monkeypatch.setattr(Sampler, "counted", interrupt)
    with pytest.raises(KeyboardInterrupt) as error:
        work(Sampler(PlainComponents(settings), {}, step=7), tmp_path)
    assert error.tb
    assert set(tqdm.tqdm._instances) <= before


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0:00"), (59.6, "1:00"), (3599.0, "59:59"), (3723.0, "1:02:03")]
)
def test_durations_look_like_a_clock(seconds, text):
    assert duration(seconds) == text
