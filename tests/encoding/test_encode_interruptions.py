"""Interrupted and shared encoding: signals, kills, full disks and processes."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from encoded_images import CLASSES, CONFIG, assert_holds, fields, settings, tree
from ended_runs import GLOO, environment, joined

from dig_jax.autoencoder.model import encode_images
from dig_jax.encoding import encode as encode_module
from dig_jax.encoding import shard_writer
from dig_jax.encoding.encode import encode
from dig_jax.errors import UserError
from dig_jax.files.atomic import temporary_name

ROOT = Path(__file__).parents[2]


class Ended(BaseException):
    """Takes the place of a signal."""


def end_at(monkeypatch, call):
    """Raise `Ended` before the call-th change to the disk."""
    count = 0

    def counted(function):
        def counting(*args, **kwargs):
            nonlocal count
            count += 1
            if count == call:
                raise Ended
            return function(*args, **kwargs)

        return counting

    for module, name in (
        (shard_writer, "array_record_writer"),
        (shard_writer, "sha256"),
        (shard_writer, "write_json"),
        (encode_module, "write_json"),
        (shard_writer.os, "replace"),
    ):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))


def test_ended_anywhere_it_resumes_and_keeps_finished_files(made, complete, tmp_path, monkeypatch):
    expected = tree(complete[0])
    for call in range(1, 100):
        path = tmp_path / str(call)
        with monkeypatch.context() as patch:
            end_at(patch, call)
            try:
                encode(settings(made, path))
                break
            except Ended:
                pass
        assert not (path / "index.json").exists()
        left = tree(path) if path.exists() else {}
        assert not any(Path(name).name.startswith(".") for name in left)
        done = {
            name: (path / name).stat().st_mtime_ns
            for name in left
            if name.endswith(".array_record") and name.replace("array_record", "json") in left
        }
        encode(settings(made, path))
        assert {name: (path / name).stat().st_mtime_ns for name in done} == done
        assert tree(path) == expected
    assert call > 20


def test_what_a_killed_run_left_is_removed(made, complete, copy):
    expected = tree(complete[0])
    train = copy / "train"
    (copy / "index.json").unlink()
    temporary_name(train / "00001.array_record").write_bytes(b"half")
    temporary_name(train / "00001.json").write_bytes(b"{")
    (train / "00000.json").write_bytes(b"")  # a machine that lost its power
    (train / "00001.json").unlink()
    (train / "00001.array_record").write_bytes(b"half")
    (copy / "heldout" / "00000.array_record").write_bytes(b"short")
    encode(settings(made, copy))
    assert tree(copy) == expected


def test_a_full_disk_is_reported_in_one_line_and_finished_files_are_kept(made, complete, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    smallest = min(path.stat().st_size for path in (complete[0] / "train").glob("*.array_record"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (smallest // 2, hard))  # which Python takes for a full disk
    try:
        with pytest.raises(UserError, match="cannot write to .*: write.. failed: File too large") as caught:
            encode(settings(made, tmp_path / "cache"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert sorted(tree(tmp_path / "cache")) == ["encoding.json"]
    encode(settings(made, tmp_path / "cache"))
    assert tree(tmp_path / "cache") == tree(complete[0])


def test_sigterm_interrupts_it_and_the_next_run_resumes(made, complete, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    replace = os.replace

    def replace_with_signal(source, target):
        if Path(target).name == "00001.array_record":
            os.kill(os.getpid(), signal.SIGTERM)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(shard_writer.os, "replace", replace_with_signal)
        with pytest.raises(KeyboardInterrupt):
            encode(settings(made, tmp_path / "cache"))
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "cache" / "train" / "00000.json").exists()
    encode(settings(made, tmp_path / "cache"))
    assert tree(tmp_path / "cache") == tree(complete[0])


def test_processes_share_the_files(made, complete, tmp_path):
    cache, file = tmp_path / "cache", tmp_path / "config.py"
    file.write_text(CONFIG.format(fields(made, cache)))
    command = [sys.executable, "main.py", f"--config={file}", "--mode=encode"]
    options = {"cwd": ROOT, "env": environment() | GLOO}
    options |= {"stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, *flags], **options) for flags in joined(2)]
    logs = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    assert_holds(cache, made, 1e-4)
    found, alone = (sorted(tree(directory)) for directory in (cache, complete[0]))
    assert found == alone
    # ant/3.png is in the first file, bee/3.png in the second.
    skipped = [[name for name in CLASSES if f"{name}/3.png: " in log] for log in logs]
    assert skipped == [["ant"], ["bee"]], logs


def test_sigterm_ends_a_run_also_if_a_library_drops_the_exception(made, tmp_path, monkeypatch):
    encoded = []

    def deaf(*arguments):
        with contextlib.suppress(KeyboardInterrupt):
            if not encoded:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
        encoded.append(arguments)
        return encode_images(*arguments)

    monkeypatch.setattr(shard_writer, "encode_images", deaf)
    with pytest.raises(KeyboardInterrupt):
        encode(settings(made, tmp_path / "cache"))
    assert len(encoded) <= 4  # of 2 · 24: two batches are in flight


HANGING = """
import threading
from dig_jax.data.image_folder import ImageFiles

read, reads = ImageFiles.read, []
def hang(self, index):
    reads.append(index)
    if len(reads) > 5:
        print("hangs", flush=True)
        threading.Event().wait()
    return read(self, index)
ImageFiles.read = hang
"""


def test_sigterm_ends_a_run_while_a_read_hangs(made, tmp_path):
    (tmp_path / "config.py").write_text(HANGING + CONFIG.format(fields(made, tmp_path / "cache")))
    command = [sys.executable, "main.py", f"--config={tmp_path}/config.py", "--mode=encode"]
    with subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as process:
        limit = threading.Timer(120, process.kill)
        limit.start()
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        process.wait()
        limit.cancel()
    assert process.returncode == 130
    assert time.monotonic() - sent < 60
