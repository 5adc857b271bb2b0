"""Rows of JSON lines survive killed runs; invalid lines are skipped."""

import pytest

from dig_jax.files.jsonl import append_row, read_rows, truncate_rows


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def test_rows_come_back_in_order(path):
    rows = [{"step": 3, "loss": 0.1}, {"step": 1, "command": "line\nbreaks: \u2028 \x0b \x85"}]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows


def test_a_row_after_an_incomplete_line_is_kept(path):
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    append_row(path, {"step": 2})
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "line",
    [b"", b"3", b"[1]", b'{"loss": 1}', b'{"step": "x"}', b'{"step": true}', b"\xff\x00", b"[" * 100_000],
)
def test_invalid_lines_are_skipped_counted_and_dropped(path, line):
    kept = b'{"step":1,  "loss": 3.0e0}\n'
    path.write_bytes(kept + line + b'\n{"step": 6}\n')
    assert read_rows(path) == [{"step": 1, "loss": 3.0}, {"step": 6}]
    assert truncate_rows(path, last_step=5) == 1
    assert path.read_bytes() == kept


def test_a_missing_file_has_no_rows(path):
    assert read_rows(path) == []
    assert truncate_rows(path, last_step=0) == 0
    assert path.read_bytes() == b""
