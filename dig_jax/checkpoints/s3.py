"""Checkpoints in s3://: make Orbax treat these paths as it treats gs://.

Orbax opens gs:// with TensorStore's gcs driver, and takes every other path for a local one, although
TensorStore also has an s3 driver. Four private functions of Orbax decide; a test saves and restores, so that
a new version of Orbax that moves them cannot pass unnoticed.
"""

import functools
import os
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from dig_jax.files.paths import Path

_SCHEMES = ("gs://", "s3://")


def prepare_orbax(directory: Path) -> None:
    """Enable checkpoints in s3://, if that is where the directory is. Call it before Orbax sees the path."""
    if str(directory).startswith("s3://"):
        _enable_s3()


@functools.cache
def _enable_s3() -> None:
    gcs_spec, normalize = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path

    def spec(path: str) -> dict[str, Any]:
        return _s3_spec(path) if path.startswith("s3://") else gcs_spec(path)

    # By this prefix Orbax chooses a marker file over an atomic rename, which object storage lacks.
    gcs_utils._GCS_PATH_PREFIX = _SCHEMES
    gcs_utils.get_kvstore_for_gcs = spec
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(_SCHEMES)
    tensorstore_utils._normalize_path = lambda path: normalize(path).replace("s3:/", "s3://")


def _s3_spec(path: str) -> dict[str, Any]:
    """Return TensorStore's description of a path, with the server and credentials that s3fs uses."""
    bucket, _, key = path.removeprefix("s3://").partition("/")
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key, **_s3_server()}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # otherwise TensorStore logs each file that it looks for them in
        spec["aws_credentials"] = {"type": "environment"}
    return spec


@functools.cache
def _s3_server() -> dict[str, str]:
    """Return the endpoint and region of the user's settings; {} for Amazon, where TensorStore finds them."""
    import botocore.session

    client = botocore.session.get_session().create_client("s3")
    if client.meta.endpoint_url.endswith(".amazonaws.com"):
        return {}
    return {"endpoint": client.meta.endpoint_url, "aws_region": client.meta.region_name}
