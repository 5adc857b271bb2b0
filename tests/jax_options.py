"""JAX's options for the duration of a test."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


@contextlib.contextmanager
def jax_options(**options: object) -> Iterator[None]:
    """Set options of JAX, and reset its compilation cache, which reads some of them only once."""
    before = {name: jax.config.values[name] for name in options}
    try:
        _update(options)
        yield
    finally:
        _update(before)


def unoptimized(cache: Path) -> contextlib.AbstractContextManager[None]:
    """Compile without optimizations and share compiled programs in a directory: compiling costs the most."""
    return jax_options(
        jax_disable_most_optimizations=True,
        jax_compilation_cache_dir=str(cache),
        jax_persistent_cache_min_compile_time_secs=0,
        jax_persistent_cache_min_entry_size_bytes=-1,
    )


def _update(options: dict[str, object]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
