"""The evaluator of FID and other scores that compare features of a network."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

from jaxtyping import Int, UInt8
from numpy import ndarray

from dig_jax.components import Components
from dig_jax.config import Config, EvaluationConfig
from dig_jax.errors import ConfigError, naming_setting
from dig_jax.evaluation.collection import Collection, Collector, Outputs, gathered
from dig_jax.evaluation.evaluator import Accumulator, Evaluator, Scores, Task
from dig_jax.evaluation.features.network import FeatureNetwork
from dig_jax.evaluation.image_sets import Images
from dig_jax.evaluation.references import Needs, Networks, Reference, check_reference, read_reference
from dig_jax.evaluation.scores import Score, scores_named
from dig_jax.evaluation.store import Store
from dig_jax.files.paths import Path
from dig_jax.parallel import on_process_0
from dig_jax.progress import Progress

log = logging.getLogger(__name__)

# Images read at once.
_PART = 256


class FeatureEvaluator(Evaluator):
    """The evaluator of `config.evaluation.scores`."""

    def applies_to(self, settings: Config) -> bool:
        """Return whether the config names scores."""
        return bool(settings.evaluation.score_names)

    def rankings(self, settings: Config) -> Mapping[str, bool]:
        """Return the figures of all scores, without spreads and counts."""
        scores = _scores(settings)
        return {
            figure: score.higher_is_better for name, score in scores.items() for figure in score.ranks(name)
        }

    def check(self, components: Components) -> None:
        """Check scores, weights, the number of images and the reference."""
        settings, needs = components.config.evaluation, needs_of(_scores(components.config))
        for name in needs:
            network(name, settings)
        _check_classes(components)
        check_reference(settings.reference, components)

    def start(self, task: Task) -> Accumulator:
        """Load networks and reference."""
        if task.labels is not None:
            _check_classes(task.components)
        return FeatureAccumulator(task)

    def summary(self, scores: Mapping[str, Any]) -> str:
        """Return all scores, and what they were measured on."""
        figures = ", ".join(
            f"{name} {scores[name]:.5g}" for name in scores["protocols"]["figures"] if name in scores
        )
        return f"{figures} ({scores['num_images']} images, reference: {scores['reference']['name']})"


class FeatureAccumulator(Accumulator):
    """Features of the images of a task, and the scores of them.

    Raises:
        UserError: missing weights, unknown scores or an invalid reference.
    """

    def __init__(self, task: Task):
        settings = task.components.config
        self._scores, self._task = _scores(settings), task
        self._needs = needs_of(self._scores)
        self._networks = {name: network(name, settings.evaluation) for name in self._needs}
        self._reference = self._read_reference()
        self._collectors = {name: Collector(self._networks[name], need) for name, need in self._needs.items()}
        self._store = None
        if task.folder is not None:
            identity = {"images": task.images.fingerprint, "count": task.count}
            self._store = Store(
                task.folder / "features.npz", identity | _identity(self._networks, self._needs)
            )
            self.first = self._store.load(self._collectors)

    def add(self, indices: Int[ndarray, " n"], images: UInt8[ndarray, "n h w c"]) -> None:
        """Compute features, and save them now and then."""
        if self._store is not None:
            self._store.save_if_due(self._collectors)
        for collector in self._collectors.values():
            collector.add(indices, images)

    def scores(self) -> Scores:
        """Return all scores and their protocols."""
        collections = {name: gathered(collector.collection) for name, collector in self._collectors.items()}
        if self._store is not None:
            self._store.save(collections)
        scores = on_process_0(lambda: self._scores_of(collections))
        if self._store is not None:
            self._store.delete()
        return scores

    def _scores_of(self, collections: Mapping[str, Collection]) -> Scores:
        features = {name: collection.feature_set() for name, collection in collections.items()}
        figures: Scores = {}
        for name, score in self._scores.items():
            reference = self._reference.features[score.network] if score.needs_reference else None
            with naming_setting(f"config.evaluation.scores: {name}"):
                figures |= score.figures(name, features[score.network], reference)
        ranks = [figure for name, score in self._scores.items() for figure in score.ranks(name)]
        return figures | {
            "num_images": self._task.count,
            "protocols": {"figures": ranks} | {name: score.protocol for name, score in self._scores.items()},
            "networks": {
                name: {"weights": n.weights_hash, "preprocessing": n.preprocessing}
                for name, n in self._networks.items()
            },
            "reference": {
                key: value for key, value in self._reference.description.items() if key in _RECORDED
            },
        }

    def _read_reference(self) -> Reference:
        needs = needs_of({name: score for name, score in self._scores.items() if score.needs_reference})
        if not needs:
            return Reference({}, {"name": "none"})
        networks = {name: self._networks[name] for name in needs}
        settings, folder = self._task.components.config.evaluation, self._task.folder
        return read_reference(
            settings.reference,
            self._task.components,
            self._task.images.shape,
            networks,
            needs,
            functools.partial(collect, folder=folder),
            folder and folder / "reference.npz",
        )


_RECORDED = ("name", "images", "hash")


def collect(images: Images, networks: Networks, needs: Needs, folder: Path | None) -> dict[str, Collection]:
    """Return the features of all images of a set; show progress, and resume if `folder` is given.

    All processes call it; each computes a share and gets all features.
    """
    collectors = {name: Collector(networks[name], needs[name]) for name in networks}
    first, store = 0, None
    if folder is not None:
        identity = {"images": images.fingerprint, "count": len(images)}
        store = Store(folder / "reference_features.npz", identity | _identity(networks, needs))
        first = store.load(collectors)
    log.info("computing features of %d images of the reference: %s", len(images), images.name)
    with Progress("image", first=first, total=len(images), every_seconds=10.0) as progress:
        for number, (indices, part) in enumerate(images.parts(first, _PART, len(images)), 1):
            for collector in collectors.values():
                collector.add(indices, part)
            if store is not None:
                store.save_if_due(collectors)
            progress.show(min(first + number * _PART, len(images)))
    collections = {name: gathered(collector.collection) for name, collector in collectors.items()}
    if store is not None:
        store.delete()
    return collections


def needs_of(scores: Mapping[str, Score]) -> dict[str, Outputs]:
    """Return the outputs that scores need, by network."""
    names = dict.fromkeys(score.network for score in scores.values())
    return {name: Outputs.of(score for score in scores.values() if score.network == name) for name in names}


def network(name: str, settings: EvaluationConfig) -> FeatureNetwork:
    """Return a feature network with the weights of the config.

    Raises:
        UserError: missing or invalid weights.
    """
    field = "inception_weights" if name == "inception" else "dinov2_weights"
    return _network(name, getattr(settings, field) or "")


@functools.lru_cache(maxsize=4)  # evaluations in training and sweeps use it again
def _network(name: str, source: str) -> FeatureNetwork:
    from dig_jax.evaluation.features.registry import load_features

    return load_features(name, source)


def _check_classes(components: Components) -> None:
    settings, classes = components.config.evaluation, components.image_spec.num_classes
    if settings.labels == "balanced" and settings.num_images < classes:
        raise ConfigError(
            f"config.evaluation.num_images={settings.num_images} is less than the number of classes,"
            f" {classes}; expected at least {classes}, or config.evaluation.labels=random"
        )


def _scores(settings: Config) -> dict[str, Score]:
    try:
        return scores_named(settings.evaluation.score_names)
    except ValueError as error:
        raise ConfigError(f"invalid config.evaluation.scores: {error}") from error


def _identity(networks: Networks, needs: Needs) -> dict[str, Any]:
    return {
        "networks": {name: [n.weights_hash, n.preprocessing] for name, n in networks.items()},
        "outputs": {name: [sorted(need.moments), sorted(need.rows)] for name, need in needs.items()},
    }
