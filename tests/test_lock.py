import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from object_storage import bucket, directed, storage_servers  # noqa: F401 (fixtures)

from dig_jax.errors import UserError
from dig_jax.files import lock
from dig_jax.files.lock import writer_lock
from dig_jax.files.paths import storage, to_path
from dig_jax.files.processes import is_running, machine, start_time

_HOLD = """
import sys, time
from pathlib import Path
from dig_jax.files import lock
lock._BEAT = 0.05
with lock.writer_lock(Path(sys.argv[1]), "the run"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / ".lock"


@pytest.fixture
def fast(monkeypatch):
    """Writers on other machines renew their locks 20 times per second and are dead after half a second."""
    for name, seconds in {"_BEAT": 0.05, "_DEAD": 0.5, "_POLL": 0.05}.items():
        monkeypatch.setattr(lock, name, seconds)


@contextlib.contextmanager
def holder(path: Path, **options):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", _HOLD, path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message), writer_lock(path, "the run"):
        pass


def change(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_second_writer_is_refused_in_one_line_that_names_the_first_and_touches_nothing(path):
    with holder(path) as process:
        before = path.read_bytes()
        with pytest.raises(UserError) as caught, writer_lock(path, "the run"):
            pass
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [".lock"]
    expected = rf"the run is in use by process {process.pid} on .+ \(user .+\) since \d{{4}}-\d\d-\d\d .* UTC"
    assert re.fullmatch(expected, str(caught.value))


def test_the_lock_is_removed_when_its_owner_ends_also_by_an_error(path):
    for error in (None, ValueError):
        with contextlib.suppress(ValueError), writer_lock(path, "the run"):
            assert path.exists()
            if error:
                raise error
        assert not path.exists()


def test_one_process_does_not_hold_a_lock_twice(path):
    with writer_lock(path, "the run"):
        assert_refused(path, f"in use by process {os.getpid()} ")
    assert not path.exists()


@pytest.mark.parametrize("is_reaped", [True, False])
def test_the_lock_of_a_killed_process_of_this_machine_does_not_delay_the_next(path, is_reaped):
    with holder(path) as process:
        process.send_signal(signal.SIGKILL)
        if is_reaped:
            process.wait()
        else:  # a zombie
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        start = time.monotonic()
        with writer_lock(path, "the run"):
            assert time.monotonic() - start < lock._DEAD / 2


def test_a_process_with_the_number_of_a_dead_owner_is_not_the_owner(path):
    path.parent.mkdir()
    with writer_lock(path, "the run"):
        content = path.read_text()
    path.write_text(content)
    change(path, pid=os.getppid(), started="1")
    with writer_lock(path, "the run"):
        pass


def test_a_stopped_process_of_this_machine_keeps_its_lock(path, fast):
    with holder(path) as process:
        process.send_signal(signal.SIGSTOP)
        assert_refused(path, "in use")


def test_another_machine_keeps_its_lock_while_it_renews_it(path, fast, monkeypatch):
    with writer_lock(path, "the run"):
        monkeypatch.setattr(lock, "machine", lambda: "another")
        with (
            pytest.raises(UserError, match=f"in use by process {os.getpid()} "),
            writer_lock(path, "the run"),
        ):
            pass


@pytest.mark.parametrize("text", ["", "[" * 9999, '{"pid": 1}', None])
def test_a_lock_that_is_not_renewed_is_replaced_whatever_it_holds(path, fast, text):
    with writer_lock(path, "the run"):
        content = path.read_text()
    path.write_text(content if text is None else text)
    if text is None:
        change(path, machine="another", host="elsewhere")
    with writer_lock(path, "the run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_writer_whose_lock_was_taken_over_exits_at_once_and_leaves_it(path):
    with holder(path, stderr=subprocess.PIPE) as process:
        change(path, token="another", host="elsewhere", pid=7)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert (
        error.startswith("error: the run was taken over by process 7 on elsewhere") and error.count("\n") == 1
    )
    assert json.loads(path.read_text())["token"] == "another"


def test_a_lock_that_was_deleted_is_written_again(path, fast):
    with writer_lock(path, "the run"):
        path.unlink()
        deadline = time.monotonic() + 10
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert_refused(path, "in use")


@pytest.mark.parametrize("is_stale", [False, True])
def test_of_many_that_start_at_once_one_writes(path, fast, is_stale):
    for _ in range(10):
        if is_stale:
            path.parent.mkdir(exist_ok=True)
            with writer_lock(path, "the run"):
                content = path.read_text()
            path.write_text(content)
            change(path, started="1")
        outcomes, gate = [], threading.Barrier(8)

        def start(outcomes=outcomes, gate=gate):
            gate.wait()
            try:
                with writer_lock(path, "the run"):
                    outcomes.append("held")
                    while len(outcomes) < 8:
                        time.sleep(0.01)
            except UserError:
                outcomes.append("refused")

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["held"] + ["refused"] * 7
        assert not path.exists()


def test_a_directory_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "x.safetensors").write_text("")
    for folder in (tmp_path / "x.safetensors", tmp_path / "x.safetensors" / "more"):
        assert_refused(folder / ".lock", f"invalid directory {folder}: it is a file or in a file")


def test_a_dangling_link_is_one_line(path):
    path.parent.mkdir()
    path.symlink_to("missing")
    timer = threading.Timer(20, lambda: path.unlink(missing_ok=True))  # ends an endless loop
    timer.start()
    try:
        assert_refused(path, f"{path} is a symbolic link to a missing file; expected no link: delete it")
        assert path.is_symlink()
    finally:
        timer.cancel()


def test_running_processes_are_told_from_others():
    assert is_running(os.getpid()) and is_running(os.getpid(), start_time(os.getpid()))
    assert not is_running(os.getpid(), "1")
    assert not is_running(2**22 + 1)  # above the largest number
    assert is_running(1)
    assert machine() == machine() != ""


def test_a_lock_in_object_storage_excludes_names_and_replaces_like_a_local_one(bucket, fast, monkeypatch):  # noqa: F811
    path = to_path(f"{bucket}/run/.lock")
    with writer_lock(path, "the run"):
        assert_refused(path, f"in use by process {os.getpid()} on .* since ")
        # In one request, because the lock is being renewed.
        content = storage(path).cat_file(str(path))
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(lock, "machine", lambda: "another")
            assert_refused(path, f"in use by process {os.getpid()} ")  # it renews its lock
    assert not path.exists()
    for fields in ({"started": "1"}, {"machine": "another"}):  # a dead process; a dead machine
        path.write_bytes(json.dumps(json.loads(content) | fields).encode())
        with writer_lock(path, "the run"):
            assert json.loads(path.read_bytes())["started"] == start_time(os.getpid())
