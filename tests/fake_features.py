"""A small network in place of Inception: random projections of 4×4 means of an image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dig_jax.evaluation import feature_scores

DIMENSIONS = {"pool": 6, "spatial": 4, "logits": 10, "logits_with_bias": 10, "cls": 5}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FakeNetwork:
    weights: dict[str, jax.Array]
    name: str = dataclasses.field(metadata={"static": True})
    weights_hash: str = dataclasses.field(metadata={"static": True})
    preprocessing: str = dataclasses.field(default="means of 4×4 blocks", metadata={"static": True})

    @property
    def dimensions(self):
        return DIMENSIONS

    def __call__(self, images):
        n, height, width, _ = images.shape
        blocks = images.astype(jnp.float32).reshape(n, 4, height // 4, 4, width // 4, 3)
        means = blocks.mean((2, 4)).reshape(n, 48) / 128 - 1
        return {name: jnp.tanh(means @ matrix) for name, matrix in self.weights.items()}


def fake_network(name="inception", source=""):
    random = np.random.default_rng(len(name))
    weights = {key: random.normal(size=(48, d)).astype(np.float32) for key, d in DIMENSIONS.items()}
    return FakeNetwork(weights, name, f"hash of {source}")


def use_fake_networks(monkeypatch):
    monkeypatch.setattr(feature_scores, "_network", fake_network)


def random_images(seed, count, size=8, channels=3):
    random = np.random.default_rng(seed)
    brightness = random.integers(0, 128, (count, 1, 1, channels))
    return (brightness + random.integers(0, 128, (count, size, size, channels))).astype(np.uint8)
