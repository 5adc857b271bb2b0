"""Rows and sample grids in metrics.jsonl, TensorBoard and wandb."""

import contextlib
import json
import sys
import threading
import types

import pytest
from PIL import Image
from tensorboardX.event_file_writer import EventsWriter

from dig_jax.errors import ConfigError, UserError
from dig_jax.training.telemetry.wandb import WandbRun, require_wandb
from dig_jax.training.telemetry.writer import MetricWriter


def write(workdir, first_step: int, *rows: tuple[int, dict]) -> list[dict]:
    with contextlib.closing(MetricWriter(workdir, first_step=first_step, tensorboard=False)) as writer:
        for step, row in rows:
            writer.write(step, row)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_has_every_step_once(tmp_path):
    write(tmp_path, 0, (1, {"loss": 3.0}), (2, {"loss": 2.0}), (3, {"loss": 1.0}))
    assert write(tmp_path, 2, (3, {"loss": 1.5}), (4, {"loss": 1.0})) == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 1.5},
        {"step": 4, "loss": 1.0},
    ]


@pytest.mark.parametrize(
    "garbage",
    [b'{"step": 2, "lo', b"3\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"\xff\x00\n", b"\n"],
)
def test_invalid_lines_are_dropped_and_logged(tmp_path, garbage, caplog):
    good = b'{"step": 1, "loss": 3.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + garbage)
    assert write(tmp_path, 5, (6, {"loss": 1.0})) == [{"step": 1, "loss": 3.0}, {"step": 6, "loss": 1.0}]
    assert "dropped 1 invalid lines from " in caplog.text


def test_nan_and_infinity_become_null(tmp_path):
    row = {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 0.1}
    assert write(tmp_path, 0, (1, row)) == [
        {"step": 1, "loss": None, "grad_norm": None, "learning_rate": 0.1}
    ]


def test_tensorboard_gets_finite_values(tmp_path):
    with contextlib.closing(MetricWriter(tmp_path, first_step=0, tensorboard=True)) as writer:
        writer.write(1, {"loss": 1.0, "grad_norm": float("nan")})
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"loss" in events and b"grad_norm" not in events


def test_tensorboard_gets_the_samples(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "samples.png")
    with contextlib.closing(MetricWriter(tmp_path, first_step=0, tensorboard=True)) as writer:
        writer.write_image(3, tmp_path / "samples.png")
        writer.write_image(3, tmp_path / "missing.png")
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"samples" in events and b"PNG" in events


class Wandb(types.ModuleType):
    """A stand-in for the package that stores its calls."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.axes, self.finished = [], [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def define_metric(self, name, *, step_metric):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def Image(self, path):  # noqa: N802
        return f"image of {path}"

    def finish(self):
        self.finished += 1


def test_wandb_gets_rows_and_samples_and_a_resumed_run_continues_its_run(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Image.new("RGB", (8, 8)).save(tmp_path / "samples.png")
    for first in (0, 1):
        run = WandbRun(tmp_path, project="digits", settings={"seed": 3})
        writer = MetricWriter(tmp_path, first_step=first, tensorboard=False, wandb=run)
        with contextlib.closing(writer):
            writer.write(first + 1, {"loss": 1.0, "grad_norm": float("nan")})
            writer.write_image(first + 1, tmp_path / "samples.png")
    assert wandb.logged == [
        {"step": 1, "loss": 1.0},
        {"step": 1, "samples": f"image of {tmp_path}/samples.png"},
        {"step": 2, "loss": 1.0},
        {"step": 2, "samples": f"image of {tmp_path}/samples.png"},
    ]
    first, second = wandb.started
    assert first == second and first["project"] == "digits" and first["resume"] == "allow"
    assert first["config"] == {"seed": 3} and first["dir"] == tmp_path
    assert wandb.axes == [("*", "step")] * 2 and wandb.finished == 2


def test_a_failure_to_start_wandb_raises_one_line(tmp_path, monkeypatch):
    wandb = Wandb()
    wandb.init = lambda **_: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match=r"config.logging.wandb='x': division .*WANDB_MODE=offline"):
        WandbRun(tmp_path, project="x", settings={})


def test_wandb_needs_its_package(monkeypatch):
    require_wandb(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"config.logging.wandb='digits' needs the package wandb: pip install -e '.\[wandb\]'",
    ):
        require_wandb("digits")


# tensorboardX does not close a file that it cannot flush.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("broken", ["__init__", "flush", "close"])
def test_a_full_disk_turns_tensorboard_off_once_and_rows_are_written_on(
    tmp_path, caplog, monkeypatch, broken
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, broken, fail)
    with contextlib.closing(MetricWriter(tmp_path, first_step=0, tensorboard=True)) as writer:
        for step in range(1, 40):
            writer.write(step, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 39
    assert caplog.messages == [
        f"TensorBoard is off: cannot write to {tmp_path / 'tensorboard'}: No space left on device"
    ]


def test_tensorboard_starts_no_thread_whose_death_could_block_training(tmp_path):
    before = threading.active_count()
    with contextlib.closing(MetricWriter(tmp_path, first_step=0, tensorboard=True)):
        assert threading.active_count() == before
