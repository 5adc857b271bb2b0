import copy
import dataclasses
import functools
import json
import runpy
from pathlib import Path

import pytest

from configs import base, smoke
from dig_jax.config import Config, check_same, flattened, from_dict
from dig_jax.errors import ConfigError
from dig_jax.training.loop import train

SMOKE = smoke.get_config().to_dict()


def changed(**fields) -> dict:
    """The smoke config with group__field=value."""
    settings = copy.deepcopy(SMOKE)
    for name, value in fields.items():
        *groups, field = name.split("__")
        functools.reduce(dict.__getitem__, groups, settings)[field] = value
    return settings


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_survives_json(path):
    get_config = runpy.run_path(str(path))["get_config"]
    settings = from_dict(
        (get_config("DiG-S/2", "256") if path.stem == "imagenet" else get_config()).to_dict()
    )
    assert isinstance(settings, Config)
    assert from_dict(json.loads(json.dumps(dataclasses.asdict(settings)))) == settings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainin": 1}, r"config has no field 'trainin'; did you mean 'training'\?"),
        ({"model__detph": 2}, r"config.model has no field 'detph'; did you mean 'depth'\?"),
        ({"mesh__zzz": 2}, r"config.mesh has no field 'zzz'; it has data"),
        ({"model": 3}, r"config.model=3 is no group of fields"),
        ({"seed": 1.0}, r"config.seed=1.0 is not of type int"),
        ({"seed": True}, r"config.seed=True is not of type int"),
        ({"seed": -1}, r"config.seed=-1 is not in 0…2³¹-1"),
        ({"model__learn_sigma": 1}, r"config.model.learn_sigma=1 is not of type bool"),
        (
            {"model__dtype": "bfloat15"},
            r"config.model.dtype='bfloat15' is none of .*did you mean 'bfloat16'\?",
        ),
        ({"model__patch_size": -2}, r"config.model.patch_size=-2 is not zero or more"),
        ({"data__options": 3}, r"config.data.options=3 is not of type dict"),
        ({"data__batch_size": 0}, r"config.data.batch_size=0 is not positive"),
        ({"training__steps": "many"}, r"config.training.steps='many' is not of type int"),
        ({"training__accumulation": 3}, r"batch_size=16 is not a multiple of config.training.accumulation=3"),
        ({"training__label_dropout": 1.5}, r"config.training.label_dropout=1.5 is not between 0 and 1"),
        ({"training__ema_decays": ("abc",)}, r"config.training.ema_decays='abc' is not of type float"),
        ({"training__ema_decays": ()}, r"config.training.ema_decays=\(\) must be one or more different"),
        ({"training__ema_decays": (0.9, 0.90)}, r"config.training.ema_decays=\(0.9, 0.9\) must be"),
        ({"training__ema_decays": (float("nan"),)}, r"config.training.ema_decays=\(nan,\) must be"),
        ({"optimizer__learning_rate": 0.0}, r"config.optimizer.learning_rate=0.0 is not positive"),
        ({"optimizer__learning_rate": float("inf")}, r"config.optimizer.learning_rate=inf is not positive"),
        ({"optimizer__schedule": "cosin"}, r"config.optimizer.schedule='cosin' .*did you mean 'cosine'\?"),
        ({"checkpoint__keep": 0}, r"config.checkpoint.keep=0 is not positive"),
        ({"logging__every_steps": 0}, r"config.logging.every_steps=0 is not positive"),
        ({"sampling__ema": "0.95"}, r"config.sampling.ema='0.95' is none of 0.9, 0.99, params"),
        ({"evaluation__num_images": -1}, r"config.evaluation.num_images=-1 is not zero or more"),
    ],
)
def test_a_field_that_cannot_be_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(changed(**fields))


def test_a_missing_field_is_named():
    settings = copy.deepcopy(SMOKE)
    del settings["optimizer"]["b2"]
    with pytest.raises(ConfigError, match="config.optimizer.b2 is missing"):
        from_dict(settings)


def test_a_config_of_an_older_version_is_read_with_the_defaults_of_what_it_lacks():
    """A new field without a default would shut out every workdir that there is."""
    stored = json.loads(Path("tests/golden/config.json").read_text())
    filled, present = flattened(dataclasses.asdict(from_dict(stored))), flattened(stored)
    defaults = flattened(base.get_config().to_dict())
    lacking = filled.keys() - present.keys()
    assert lacking
    assert {name: filled[name] for name in lacking} == {name: defaults[name] for name in lacking}
    assert {name: filled[name] for name in present} == present


def test_integers_are_taken_for_floats_and_lists_for_tuples():
    settings = from_dict(changed(optimizer__learning_rate=1, training__ema_decays=[0, 0.5]))
    assert settings.optimizer.learning_rate == 1.0
    assert settings.training.ema_decays == (0.0, 0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"training__steps": 40},
        {"checkpoint__every_steps": 3},
        {"logging__tensorboard": False},
        {"sampling__ema": "params"},
        {"mesh__data": 2},
        {"evaluation__num_images": 3},
    ],
)
def test_a_workdir_goes_on_with_more_steps_and_another_way_of_looking(change):
    check_same(from_dict(SMOKE), from_dict(changed(**change)), "runs/smoke")


def test_all_settings_that_a_workdir_did_not_begin_with_are_named():
    new = changed(
        seed=1,
        model__depth=6,
        data__options__image_size=16,
        diffusion__schedule="cosine",
        optimizer__b1=0.95,
        training__ema_decays=(0.5,),
        training__steps=99,
    )
    with pytest.raises(ConfigError) as caught:
        check_same(from_dict(SMOKE), from_dict(new), "runs/smoke")
    message = str(caught.value)
    for part in (
        "runs/smoke began with other settings",
        "seed: 0 → 1",
        "model.depth: 5 → 6",
        "data.options.image_size: 8 → 16",
        "diffusion.schedule: 'linear' → 'cosine'",
        "optimizer.b1: 0.9 → 0.95",
        "training.ema_decays: [0.9, 0.99] → [0.5]",
    ):
        assert part in message
    assert "training.steps" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__name": "DiG-T/2"}, "config.model: unknown model 'DiG-T/2'; did you mean 'DiG-"),
        ({"model__num_heads": 5}, "config.model: num_heads=5 does not divide the key width 32"),
        (
            {"model__name": "DiT-S/2", "model__num_heads": 5},
            "num_heads=5 does not divide hidden_size=64",
        ),
        ({"model__patch_size": 3}, "config.model: input height 8 is not a multiple of patch_size=3"),
        (
            {"model__depth": 6, "model__skip": "linear", "model__skip_alignment": "upstream"},
            'config.model: skip_alignment="upstream" needs directions=4 and a depth that is a multiple of 4',
        ),
        ({"data__name": "fak"}, "config.data: data source 'fak' is unknown; did you mean 'fake'"),
        ({"data__options": {"size": 3}}, "config.data: data source 'fake' has no option 'size'"),
        ({"data__batch_size": 6}, "config.data.batch_size=6 is not a multiple of the 4 devices"),
        ({"mesh__data": 5}, "config.mesh.data=5 is 5 devices, but there are 4"),
        ({"diffusion__schedule": "cosin"}, "config.diffusion: schedule must be .*did you mean 'cosine'"),
        ({"diffusion__loss": "mes"}, "config.diffusion: loss_type must be .*did you mean 'mse'"),
        ({"diffusion__num_steps": 3}, "config.diffusion: num_steps must be at least 21"),
        ({"sampling__sampler": "ddin"}, "config.sampling: sampler must be .*did you mean 'ddi"),
        ({"sampling__steps": 2000}, "config.sampling: .*2000"),
        ({"sampling__guidance_channels": 4}, "config.sampling: guidance_channels=4, but images have 3"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_before_there_is_a_workdir(tmp_path, fields, message):
    workdir = tmp_path / "run"
    with pytest.raises(ConfigError, match=message) as caught:
        train(from_dict(changed(**fields)), workdir)
    assert "\n" not in str(caught.value)
    assert not workdir.exists()
