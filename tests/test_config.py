import copy
import functools
import json
from pathlib import Path

import pytest

from configs import base, smoke
from dig_jax.config import Config, check_same, flattened, from_dict, reference, to_dict
from dig_jax.errors import ConfigError
from dig_jax.training.train import train

SMOKE = smoke.get_config().to_dict()


def changed(**fields) -> dict:
    """The smoke config with group__field=value."""
    settings = copy.deepcopy(SMOKE)
    for name, value in fields.items():
        *groups, field = name.split("__")
        functools.reduce(dict.__getitem__, groups, settings)[field] = value
    return settings


def test_fields_of_the_first_version_keep_their_names_types_values_and_order():
    """config.json, checkpoints and exports of all versions share them; later versions may add fields."""
    golden = flattened(json.loads(Path("tests/golden/base_config.json").read_text()))
    stored, configured = flattened(to_dict(Config())), flattened(base.get_config().to_dict())
    assert [name for name in stored if name in golden] == list(golden)
    for fields in (stored, configured):
        assert {name: (type(fields[name]), fields[name]) for name in golden} == {
            name: (type(value), value) for name, value in golden.items()
        }


def test_the_reference_in_the_docs_is_current():
    assert Path("docs/reference/config_reference.md").read_text() == reference.markdown(), (
        "run: python -m dig_jax.config.reference > docs/reference/config_reference.md"
    )


@pytest.mark.parametrize(
    ("field", "external"),
    [
        ("init_from", ""),
        ("model__patch_size", 0),
        ("model__conv", "none"),
        ("model__skip", "none"),
        ("autoencoder__path", ""),
        ("optimizer__clip_norm", 0),
        ("checkpoint__every_minutes", 0.0),
        ("logging__heldout_every_steps", 0),
        ("plan__price", 0.0),
        ("sampling__ema", ""),
    ],
)
def test_no_value_is_none_in_memory_and_keeps_its_external_form(field, external):
    name = field.replace("__", ".")
    for given in (external, None):
        settings = from_dict(changed(**{field: given}))
        assert functools.reduce(getattr, name.split("."), settings) is None
        assert flattened(to_dict(settings))[name] == external


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainin": 1}, r"unknown field config.trainin; did you mean 'training'\?"),
        ({"model__detph": 2}, r"unknown field config.model.detph; did you mean 'depth'\?"),
        ({"mesh__zzz": 2}, r"unknown field config.mesh.zzz; expected data, fsdp"),
        ({"model": 3}, r"invalid config.model=3; expected a group of fields"),
        ({"seed": 1.0}, r"invalid config.seed=1.0; expected a value of type int"),
        ({"seed": True}, r"invalid config.seed=True; expected a value of type int"),
        ({"seed": -1}, r"invalid config.seed=-1; expected a number from 0 to 2³¹ - 1"),
        ({"model__learn_sigma": 1}, r"invalid config.model.learn_sigma=1; expected a value of type bool"),
        (
            {"model__dtype": "bfloat15"},
            r"invalid config.model.dtype='bfloat15'; expected float32 or bfloat16; did you mean 'bfloat16'\?",
        ),
        ({"model__patch_size": -2}, r"invalid config.model.patch_size=-2; expected a positive number, or 0"),
        ({"data__options": 3}, r"invalid config.data.options=3; expected a value of type dict"),
        ({"data__batch_size": 0}, r"invalid config.data.batch_size=0; expected a positive number"),
        ({"training__steps": "many"}, r"invalid config.training.steps='many'; expected a value of type int"),
        (
            {"training__accumulation": 3},
            r"=16; expected a multiple of config.training.accumulation=3",
        ),
        ({"training__label_dropout": 1.5}, r"label_dropout=1.5; expected a number between 0 and 1"),
        (
            {"training__ema_decays": ("abc",)},
            r"ema_decays='abc'; expected a value of type float",
        ),
        ({"training__ema_decays": ()}, r"config.training.ema_decays=\(\); expected one or more distinct"),
        ({"training__ema_decays": (0.9, 0.90)}, r"config.training.ema_decays=\(0.9, 0.9\); expected"),
        ({"training__ema_decays": (float("nan"),)}, r"config.training.ema_decays=\(nan,\); expected"),
        (
            {"optimizer__learning_rate": 0.0},
            r"config.optimizer.learning_rate=0.0; expected a positive number",
        ),
        (
            {"optimizer__learning_rate": float("inf")},
            r"config.optimizer.learning_rate=inf; expected a positive",
        ),
        (
            {"optimizer__schedule": "cosin"},
            r"schedule='cosin'; expected constant, cosine or linear; did you mean 'cosine'\?",
        ),
        ({"checkpoint__keep": 0}, r"invalid config.checkpoint.keep=0; expected a positive number"),
        ({"logging__every_steps": 0}, r"invalid config.logging.every_steps=0; expected a positive number"),
        ({"sampling__ema": "0.95"}, r"invalid config.sampling.ema='0.95'; expected 0.9, 0.99 or params"),
        ({"evaluation__num_images": -1}, r"num_images=-1; expected zero or a positive number"),
    ],
)
def test_an_invalid_field_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(changed(**fields))


def test_a_config_of_an_older_version_gets_defaults_for_its_missing_fields():
    stored = json.loads(Path("tests/golden/config.json").read_text())
    filled, present = flattened(to_dict(from_dict(stored))), flattened(stored)
    defaults = flattened(base.get_config().to_dict())
    lacking = filled.keys() - present.keys()
    assert lacking
    assert {name: filled[name] for name in lacking} == {name: defaults[name] for name in lacking}
    assert {name: filled[name] for name in present} == present


def test_integers_become_floats_and_lists_become_tuples():
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
def test_a_workdir_resumes_with_more_steps_and_other_output(change):
    check_same(from_dict(SMOKE), from_dict(changed(**change)), "runs/smoke")


def test_all_settings_that_a_workdir_was_not_created_with_are_named():
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
        "runs/smoke was created with different settings",
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
        (
            {"model__num_heads": 5},
            "config.model: invalid num_heads=5; expected a divisor of the key width 32",
        ),
        (
            {"model__name": "DiT-S/2", "model__num_heads": 5},
            "num_heads=5; expected a divisor of hidden_size=64",
        ),
        (
            {"model__patch_size": 3},
            "config.model: invalid input height 8; expected a multiple of patch_size=3",
        ),
        (
            {"model__depth": 6, "model__skip": "linear", "model__skip_alignment": "upstream"},
            'config.model: invalid skip_alignment="upstream" with directions=4 and depth=6; expected ',
        ),
        ({"data__name": "fak"}, "config.data: unknown data source 'fak'; .*; did you mean 'fake'"),
        ({"data__options": {"size": 3}}, "config.data: unknown option 'size' of data source 'fake'"),
        ({"data__batch_size": 6}, "invalid config.data.batch_size=6; expected a multiple of 4 devices"),
        ({"mesh__data": 5}, "config.mesh.data=5 needs 5 devices; got 4"),
        ({"diffusion__schedule": "cosin"}, "config.diffusion: invalid schedule: .*did you mean 'cosine'"),
        ({"diffusion__loss": "mes"}, "config.diffusion: invalid loss_type: .*did you mean 'mse'"),
        ({"diffusion__num_steps": 3}, "config.diffusion: num_steps too small: got 3; expected at least 21"),
        ({"sampling__sampler": "ddin"}, "config.sampling: unknown sampler: .*did you mean 'ddi"),
        ({"sampling__steps": 2000}, "config.sampling: .*2000"),
        (
            {"sampling__guidance": "cfg_zero"},
            "config.sampling: unsupported process for CFGZero: got Gaussian",
        ),
        ({"sampling__guidance": "autoguidance"}, "config.sampling: missing weak_model"),
        (
            {"sampling__guidance": "perturbed", "sampling__guidance_options": {"blocks": [99]}},
            "config.sampling: block out of range: got 99; expected 0 … ",
        ),
        (
            {
                "model__name": "DiT-S/2",
                "sampling__guidance": "perturbed",
                "sampling__guidance_options": {"blocks": [0]},
            },
            "config.sampling: unsupported blocks of guidance 'perturbed': block 0 has no GLA",
        ),
        (
            {"sampling__guidance_channels": 4},
            "config.sampling: invalid guidance_channels=4; expected at most 3",
        ),
    ],
)
def test_settings_that_do_not_fit_together_raise_before_the_workdir_is_created(tmp_path, fields, message):
    workdir = tmp_path / "run"
    with pytest.raises(ConfigError, match=message) as caught:
        train(from_dict(changed(**fields)), workdir)
    assert "\n" not in str(caught.value)
    assert not workdir.exists()
