import dataclasses
import functools
import logging
import runpy
from pathlib import Path

import jax
import pytest

from dig_jax import ConfigError
from dig_jax.components import param_count, without_unused_options
from dig_jax.config.fields import ModelConfig
from dig_jax.models.dig import DiGOptions
from dig_jax.testing import tiny_components, tiny_settings
from dig_jax.training.state import init_params

ROOT = Path(__file__).parent.parent
cost = functools.cache(runpy.run_path(str(ROOT / "benchmarks" / "costs.py"))["cost"])

# Without the fixed table of positions.
PUBLISHED = {
    "dig_s": 32_983_328,
    "dig_b": 130_551_584,
    "dig_l": 464_760_352,
    "dig_xl": 675_659_040,
    "dit_s": 32_865_056,
    "dit_b": 130_315_808,
    "dit_l": 457_840_672,
    "dit_xl": 674_834_720,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_the_published_size(name):
    found = cost(f"{name}:256,ours")
    assert (param_count(found.params), found.tokens) == (PUBLISHED[name], 256)
    assert found.components.image_spec.image_shape == (32, 32, 4)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("s", 31_546_760),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (("b", 129_422_152), ("l", 463_491_080), ("xl", 667_631_880))
        ),
    ],
)
def test_a_u_has_as_many_parameters_as_the_plain_model_within_5_percent(size, count):
    found = cost(f"udig_{size}:256,ours")
    assert (param_count(found.params), found.tokens) == (count, 1024)
    assert abs(count / PUBLISHED[f"dig_{size}"] - 1) < 0.05


@pytest.mark.parametrize("name", ["dig_s", "dit_s"])
def test_the_resolution_changes_the_tokens_but_not_the_parameters(name):
    found = cost(f"{name}:1024,paper")
    assert (param_count(found.params), found.tokens) == (PUBLISHED[name], 4096)
    assert found.components.image_spec.image_shape == (128, 128, 4)


@pytest.mark.parametrize(
    "name",
    [
        "dis_s",
        "dis_xl:1024,paper",
        "cifar10",
        "celeba64:paper",
        "digits",
        "imagefolder",
        "imagefolder_latents",
        "smoke",
    ],
)
def test_the_other_shipped_configs_build(name):
    assert param_count(cost(name).params) > 0


def test_a_config_field_has_the_default_of_the_model_option():
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    options = {field.name: field.default for field in dataclasses.fields(DiGOptions)}
    shared = fields.keys() & {name for name, default in options.items() if default is not dataclasses.MISSING}
    assert {"directions", "conv", "skip"} <= shared
    shared -= {"dtype", "gate_normalizer"}  # text in the config
    assert {name: fields[name] for name in shared} == {name: options[name] for name in shared}


@pytest.mark.parametrize("name", ["dig_s", "dit_s", "cifar10", "imagefolder"])
def test_a_config_states_its_computed_cost(name):
    said = (ROOT / "configs" / f"{name}.py").read_text().partition('"""')[2].partition('"""')[0]
    found = cost(name)
    stated = f"{found.flops:.1e} FLOPs, {found.hours:,.0f} hours".replace("e+", "e")
    assert stated in " ".join(said.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__name": "DiG-M/2"}, "config.model: unknown model 'DiG-M/2'; did you mean"),
        (
            {"model__conv": "before"},
            "config.model: invalid conv='before'; expected one of after, ins",
        ),
        ({"model__num_heads": 3}, "config.model: invalid num_heads=3; expected a divisor of"),
        (
            {"model__patch_size": 3},
            "config.model: invalid input height 4; expected a multiple of patch_size",
        ),
        ({"model__skip": "linear"}, "config.model: invalid depth=1 with long skips; expected an even depth"),
        ({"data__name": "digit"}, "config.data: unknown data source 'digit'; .*did you mean 'digits'"),
        ({"data__options": {"size": 4}}, "config.data: unknown option 'size' of data source 'fake'"),
        ({"data__options": {"channels": 0}}, "invalid config.data.options.channels=0; expected at least 1"),
        ({"diffusion__schedule": "cosin"}, "config.diffusion: invalid schedule: .* did you mean 'cosine'"),
        ({"diffusion__loss": "l2"}, "config.diffusion: invalid loss_type: got 'l2'"),
        ({"diffusion__num_steps": 1}, "config.diffusion: num_steps too small: got 1; expected at least 21"),
    ],
)
def test_errors_name_the_group_the_field_and_the_value(changes, message):
    components = tiny_components(**changes)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(functools.partial(init_params, components))
        _ = components.diffusion


def test_fields_override_the_sizes_of_the_name():
    counts = []
    for depth in (1, 2, 3):
        components = tiny_components(model__depth=depth, model__hidden_size=64, model__patch_size=4)
        params = jax.eval_shape(functools.partial(init_params, components))
        assert params["patch_embed"]["kernel"].shape == (16, 64)
        counts.append(param_count(params))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 64**2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("skip", "linear"),
        ("directions", 2),
        ("conv", "inside"),
    ],
)
def test_options_that_a_family_lacks_are_rejected(option, value):
    components = tiny_components(**{"model__name": "DiT-S/2", f"model__{option}": value})
    message = f"config.model: unsupported option {option} of DiT-S/2: got {value!r}; expected the default"
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(functools.partial(init_params, components))


def test_options_that_a_family_lacks_are_dropped_from_stored_configs_with_a_line(caplog):
    caplog.set_level(logging.INFO, "dig_jax")
    settings = tiny_settings(model__name="DiT-S/2", model__conv="inside", model__directions=2)
    for _ in range(2):
        stored = without_unused_options(settings)
    assert stored == tiny_settings(model__name="DiT-S/2")
    line = "ignored config.model.directions, config.model.conv of the stored config, which DiT-S/2 lacks"
    assert caplog.messages == [line]
    own = tiny_settings(model__conv="inside")
    assert without_unused_options(own) == own


def test_the_width_of_the_mlp_is_an_option_with_the_default_of_the_family():
    for name, default in (("DiT-S/2", 128), ("DiG-S/2", 256)):
        wide = [
            param_count(jax.eval_shape(functools.partial(init_params, tiny_components(**fields))))
            for fields in (
                {"model__name": name},
                {"model__name": name, "model__mlp_hidden_size": default},
                {"model__name": name, "model__mlp_hidden_size": default + 8},
            )
        ]
        assert wide[0] == wide[1]
        assert wide[2] - wide[1] == 8 * (32 + 32 + 1 if name == "DiT-S/2" else 3 * 32)


def test_options_of_dig_are_not_passed_to_dit():
    components = tiny_components(model__name="DiT-S/2", model__num_heads=2, model__conv="none")
    assert param_count(jax.eval_shape(functools.partial(init_params, components))) > 0
