"""--mode=demo: a page and a JSON API that draw images on request."""

import contextlib
import importlib.util
import logging
import socket
from collections.abc import Iterator

from dig_jax.config import Config
from dig_jax.errors import ConfigError, UserError, install_command
from dig_jax.files.paths import Path

log = logging.getLogger(__name__)

# Images in the queue: more would wait longer than most people do.
_MAX_WAITING = 256
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def demo(
    settings: Config,
    workdir: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    batch_size: int = 8,
    timeout: float = 120.0,
) -> None:
    """Serve a page and a JSON API until Ctrl-C.

    Args:
        settings: `sampling` and `autoencoder` may differ from the checkpoint's.
        workdir: the run's directory, or a file of --mode=export.
        host: address to listen on; other machines reach the demo only if it is not a loopback address.
        port: TCP port; 0 takes a free one.
        batch_size: images that are drawn together; fewer are padded.
        timeout: seconds until a request is given up.

    Raises:
        UserError: gradio is not installed, the address is not available, or no model.
        ConfigError: invalid settings.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError(f"--mode=demo needs gradio; {install_command('demo')}")
    with _listening(host, port) as listener:
        from dig_jax.demo.server import serve
        from dig_jax.sampling.sampler import load

        sampler = load(workdir, settings=settings)
        serve(
            sampler,
            listener,
            batch_size=batch_size,
            timeout=timeout,
            max_waiting=_MAX_WAITING,
            local=host in _LOOPBACK,
        )


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a listening socket: an address that is taken is an error before the model is loaded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except socket.gaierror as error:
        raise ConfigError(
            f"invalid --host={host!r}; expected an address such as 127.0.0.1 or 0.0.0.0"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error
    with listener:
        yield listener
