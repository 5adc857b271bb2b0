import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax.errors import InvalidFile
from dig_jax.files.json_file import parse_object, read_json

BROKEN = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "nested lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "nested objects": b'{"a":' * 500 + b"1" + b"}" * 500,
    "a long integer": b'{"a": ' + b"9" * 400 + b"}",
    "a very long integer": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_whatever_a_json_file_holds_the_error_is_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InvalidFile) as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_file_that_is_too_large_is_not_parsed(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "x.json", max_bytes=8) == {"a": 1}
    with pytest.raises(InvalidFile, match="too large: expected at most 7 bytes"):
        read_json(tmp_path / "x.json", max_bytes=7)


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
            lambda children: st.lists(children) | st.dictionaries(st.text(), children),
            max_leaves=8,
        ),
    )
)
def test_what_was_written_is_read(value):
    assert parse_object(json.dumps(value)) == value


@given(st.binary() | st.text())
def test_no_text_raises_anything_else(text):
    with contextlib.suppress(InvalidFile):
        assert isinstance(parse_object(text), dict)
