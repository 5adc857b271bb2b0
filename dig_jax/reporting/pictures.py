"""Pictures are not worth a run: one that cannot be written is a warning."""

import contextlib
import logging
from collections.abc import Iterator

from dig_jax.errors import one_line
from dig_jax.files.paths import Path

log = logging.getLogger(__name__)


@contextlib.contextmanager
def warning_of_failure(path: Path) -> Iterator[None]:
    """Log an error of the block, which writes a picture, instead of raising it."""
    try:
        yield
    except (OSError, ValueError) as error:
        log.warning("could not write %s: %s", path, one_line(error))
