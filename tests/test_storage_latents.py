"""Latents and autoencoders in object storage, against servers on this machine."""

import dataclasses

import numpy as np
import pytest
from object_storage import bucket, directed, storage_servers  # noqa: F401 (fixtures)
from tiny_autoencoder import write_autoencoder

from configs import base
from dig_jax import config
from dig_jax.config import Config
from dig_jax.data import load_source
from dig_jax.encoding.encode import encode
from dig_jax.errors import ConfigError, UserError
from dig_jax.files import paths
from dig_jax.files.paths import to_path


def settings_of(path: str, autoencoder: str) -> Config:
    c = base.get_config()
    c.data.name, c.data.options = "latents", {"path": path}
    c.autoencoder.path = autoencoder
    c.encode.name, c.encode.batch_size, c.encode.shard_size = "fake", 4, 5
    c.encode.options = {"image_size": 16, "channels": 3, "num_classes": 2, "length": 12}
    return config.from_dict(c.to_dict())


def test_latents_in_a_bucket_equal_local_ones(bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_autoencoder(tmp_path / "autoencoder")
    for file in (tmp_path / "autoencoder").iterdir():
        paths.upload(file, to_path(f"{bucket}/autoencoder/{file.name}"))
    local, remote = tmp_path / "latents", f"{bucket}/latents"
    index = encode(settings_of(str(local), str(tmp_path / "autoencoder")))
    settings = settings_of(remote, f"{bucket}/autoencoder")
    assert encode(settings)["splits"] == index["splits"]
    assert encode(settings)["splits"] == index["splits"]  # again: only checks the files

    source, expected = (load_source("latents", "train", path=str(path)) for path in (remote, local))
    assert source.fingerprint == expected.fingerprint
    for number in range(len(expected)):
        np.testing.assert_array_equal(source[number]["image"], expected[number]["image"])
    copies = sorted(path.name for path in (tmp_path / "cache" / "dig_jax" / "files").iterdir())
    assert copies == sorted(shard["sha256"] for shard in index["splits"]["train"])

    first = to_path(f"{remote}/{index['splits']['train'][0]['file']}")
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(bytes(content))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(UserError, match="checksum mismatch"):
        load_source("latents", "train", path=remote)[0]
    encode(settings)  # repairs it
    np.testing.assert_array_equal(
        load_source("latents", "train", path=remote)[0]["image"], expected[0]["image"]
    )


def test_paths_of_data_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=f"no latents in {tmp_path}/latents"):
        load_source("latents", "train", path="~/latents")
    write_autoencoder(tmp_path / "autoencoder")
    settings = dataclasses.replace(settings_of("~/latents", "~/autoencoder"))
    encode(settings)
    assert (tmp_path / "latents" / "index.json").exists()


@pytest.mark.parametrize("name", ["image_folder"])
def test_images_in_a_bucket_are_refused_with_the_way_out(bucket, name):  # noqa: F811
    with pytest.raises((ConfigError, UserError, ValueError), match="mount"):
        load_source(name, "train", path=f"{bucket}/images", image_size=16)
