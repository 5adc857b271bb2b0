"""The parts of a training run that stay the same from the first step to the last."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import grain
from jax.sharding import Mesh

from dig_jax.components import Components, Params, network_params
from dig_jax.config import Config
from dig_jax.data import batches
from dig_jax.evaluation.evaluate import score
from dig_jax.evaluation.evaluator import Scores
from dig_jax.files.paths import Path
from dig_jax.parallel import process_shard
from dig_jax.sampling.sampler import Sampler
from dig_jax.training.state import State


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A training run on a mesh.

    Attributes:
        components: model, diffusion process and data.
        mesh: the devices of all processes.
        workdir: where the checkpoints are; all processes share it.
        output: where all other files go: on process 0 the workdir, or a local folder that stands for it if it
            is in object storage; a temporary folder on other processes.
        publish: copies new and changed files of `output` to a workdir in object storage.
    """

    components: Components
    mesh: Mesh
    workdir: Path
    output: pathlib.Path
    publish: Callable[[], None] = lambda: None

    @functools.cached_property
    def _newest_scores(self) -> Scores:
        return {}

    def score(self, state: State) -> Scores:
        """Return the scores of images of a state, and write scores.json; the newest ones are kept."""
        if self._newest_scores.get("step") != int(state["step"]):
            self._newest_scores.clear()
            self._newest_scores.update(score(self.sampler(state), self.output))
        return self._newest_scores

    @property
    def settings(self) -> Config:
        """The run's config."""
        return self.components.config

    def batches(self, step: int, examples: int) -> grain.DatasetIterator:
        """Return this process's shards of all batches after `step` steps, which took `examples` examples."""
        data, shard = self.settings.data, process_shard(self.mesh)
        until = self.settings.auxiliary.until
        return batches(
            self.components.train_source,
            batch_size=data.batch_size,
            seed=self.settings.seed,
            start=examples,
            flip=data.flip,
            features=self.components.stored_features,
            # The steps so far may have had another batch size.
            features_end=None if until is None else examples + (until - step) * data.batch_size,
            buckets=self.components.buckets,
            process_index=shard.index,
            process_count=shard.count,
        )

    def data_item(self, examples: int) -> dict[str, Any]:
        """Return a checkpoint's `data` item: the identity of the data and the number of examples consumed."""
        features, buckets = self.components.stored_features, self.components.buckets
        return {
            "seed": self.settings.seed,
            "fingerprint": self.components.train_source.fingerprint,
            "examples": examples,
            **self.components.image_spec.to_dict(),
            **({} if features is None else {"features": features.fingerprint}),
            # The order of the buckets depends on it.
            **({} if buckets is None else {"batch_size": buckets.batch_size}),
        }

    def sampled_params(self, state: State) -> Params:
        """Return the parameters to sample from and to compute the held-out loss of."""
        name = self.settings.sampled_ema
        return network_params(state["params"] if name == "params" else state["ema"][name])

    def sampler(self, state: State) -> Sampler:
        """Return a sampler of the current state on the run's devices."""
        return Sampler(self.components, self.sampled_params(state), step=int(state["step"]), mesh=self.mesh)
