import pytest

from dig_jax.errors import CheckpointError, ConfigError, UserError, naming_directory, naming_setting, one_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("the disk\nis full" + "!" * 300), "the disk is full" + "!" * 300),
        (ValueError("no such field\nhint: read the documentation"), "no such field"),
        (RuntimeError("x" * 1000), "x" * 300),
        (UserError("no a\nerror: all is well\x1b]0;title\x07.png"), "no a error: all is well?]0;title?.png"),
        (OSError(2, "No such file", "\x1b[2J\udcff"), "No such file: ?[2J?"),
        (RuntimeError("\n"), "RuntimeError"),
        (OSError(28, "No space left on device", "w/a.png"), "No space left on device: w/a.png"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("no data"), "no data"),
        (ValueError("writing: No space left on device [os_error_code='ENOSPC']"), "No space left on device"),
    ],
)
def test_an_exception_becomes_one_line(error, line):
    assert one_line(error) == line


def test_the_type_is_named_where_the_message_alone_says_nothing():
    assert one_line(KeyError("x"), name_type=True) == "KeyError: 'x'"
    assert one_line(KeyError(), name_type=True) == "KeyError"


@pytest.mark.parametrize("error", [ValueError("got 3"), CheckpointError("got 3")])
def test_the_setting_is_named_once(error):
    with (
        pytest.raises(ConfigError, match="^config.x: got 3$"),
        naming_setting("config"),
        naming_setting("config.x"),
    ):
        raise error


def test_the_directory_is_named(tmp_path):
    with pytest.raises(UserError, match="^cannot write to .*: Not a directory$"), naming_directory(tmp_path):
        raise NotADirectoryError(20, "Not a directory", "other")
