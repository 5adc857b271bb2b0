"""JAX's options for the duration of a test."""

import contextlib
from collections.abc import Iterator

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


def unoptimized() -> contextlib.AbstractContextManager[None]:
    """Compile without optimizations, because compiling costs the most."""
    return jax_options(jax_disable_most_optimizations=True)


def _update(options: dict[str, object]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
