import functools
import importlib
from pathlib import Path

import jax
import pytest
from tiny_experiment import tiny_experiment

from dig_jax import ConfigError, config
from dig_jax.experiment import Experiment, param_count
from dig_jax.training.step import init_params

CONFIGS = sorted(
    path.stem
    for path in (Path(__file__).parent.parent / "configs").glob("*.py")
    if path.stem not in ("__init__", "base", "imagenet")
)
PUBLISHED = {"dig_s": 32_983_328, "dig_b": 130_551_584, "dig_l": 464_760_352, "dig_xl": 675_659_040}


def shapes_of(name, *argument):
    """Image shape and the parameters' shapes of a shipped config, on synthetic data of the same form."""
    c = importlib.import_module(f"configs.{name}").get_config(*argument)
    if c.data.name not in ("digits", "fake"):
        shape = {k: v for k, v in c.data.options.items() if k in ("image_size", "channels", "num_classes")}
        c.data.name, c.data.options = "fake", shape
    experiment = Experiment(config.from_dict(c.to_dict()))
    return experiment.train_source.image_shape, jax.eval_shape(functools.partial(init_params, experiment))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_builds_and_the_published_ones_have_their_size(name):
    image_shape, params = shapes_of(name)
    assert param_count(params) == PUBLISHED.get(name, param_count(params)) > 0
    if name in PUBLISHED:
        assert image_shape == (32, 32, 4)


def test_the_resolution_changes_the_latents_and_not_the_parameters():
    image_shape, params = shapes_of("dig_s", "512")
    assert image_shape == (64, 64, 4)
    assert param_count(params) == PUBLISHED["dig_s"]


def test_all_published_configs_are_there():
    assert PUBLISHED.keys() <= set(CONFIGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__name": "DiG-M/2"}, "config.model: unknown model 'DiG-M/2'; did you mean"),
        ({"model__conv": "before"}, "config.model: conv='before' is none of 'after', 'inside', None"),
        ({"model__num_heads": 3}, "config.model: num_heads=3 does not divide"),
        ({"model__patch_size": 3}, "config.model: input height 4 is not a multiple of patch_size=3"),
        ({"model__skip": "linear"}, "config.model: skip='linear' needs an even depth"),
        ({"data__name": "digit"}, "config.data: data source 'digit' is unknown; did you mean 'digits'"),
        ({"data__options": {"size": 4}}, "config.data: data source 'fake' has no option 'size'"),
        ({"data__options": {"channels": 0}}, "config.data: channels of the fake source must be at least 1"),
        ({"diffusion__schedule": "cosin"}, "config.diffusion: schedule .* did you mean 'cosine'"),
        ({"diffusion__loss": "l2"}, "config.diffusion: loss_type must be one of .* got 'l2'"),
        ({"diffusion__num_steps": 1}, "config.diffusion: num_steps must be at least 21"),
    ],
)
def test_what_cannot_be_built_names_the_group_the_field_and_the_value(changes, message):
    experiment = tiny_experiment(**changes)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(functools.partial(init_params, experiment))
        _ = experiment.diffusion


def test_fields_replace_what_the_name_says():
    counts = []
    for depth in (1, 2, 3):
        experiment = tiny_experiment(model__depth=depth, model__hidden_size=64, model__patch_size=4)
        params = jax.eval_shape(functools.partial(init_params, experiment))
        assert params["patch_embed"]["kernel"].shape == (16, 64)
        counts.append(param_count(params))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 64**2


def test_settings_of_dig_do_not_reach_dit():
    experiment = tiny_experiment(model__name="DiT-S/2", model__num_heads=2)
    assert param_count(jax.eval_shape(functools.partial(init_params, experiment))) > 0
