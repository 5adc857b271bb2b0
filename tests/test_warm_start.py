"""init_from takes parameters by their meaning: settings, classes and shapes."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dig_jax import ConfigError
from dig_jax.checkpoints.parameter_file import write_parameter_file
from dig_jax.checkpoints.reader import read_model
from dig_jax.components import Components
from dig_jax.data import ImageSpec
from dig_jax.testing import mesh_of, random_params, tiny_components, tiny_settings, write_checkpoint
from dig_jax.training.state import abstract_state, init_params
from dig_jax.training.warm_start import complete, read_warm_start

PETS = ("cat", "dog", "n02099601", "a")


def components(names=None, size=(4, 4, 1), **fields):
    spec = None if names is None else ImageSpec(size, tuple(names))
    return Components(tiny_settings(**fields), spec)


def written(folder, source):
    """Write a file of random parameters; return the path and the parameters."""
    params = random_params(source)
    write_parameter_file(folder / "source.safetensors", source, 7, params)
    return folder / "source.safetensors", params


def started(path, new, partial=False, skip=""):
    """Return the parameters that a run starts from."""
    new = new.with_config(dataclasses.replace(new.config, init_partial=partial, init_skip=skip))
    start = read_warm_start(str(path), new, abstract_state(new, mesh_of(1))["params"])
    return complete(init_params(new), start.arrays, start.known_rows)


def table(params):
    return np.asarray(params["label_embed"]["table"]["embedding"])


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "dig_jax.training.warm_start")
    return caplog


SKIPS = {"model__depth": 4, "model__skip": "linear"}
MEANINGS = {
    "heads of DiT": ({"model__name": "DiT-S/2"}, {"model__num_heads": 2}, "model.num_heads: 1 → 2"),
    "convolution": ({}, {"model__conv": "inside"}, "model.conv: after → inside"),
    "directions": ({}, {"model__directions": 2}, "model.directions: 4 → 2"),
    "alignment": (SKIPS, {"model__skip_alignment": "upstream"}, "model.skip_alignment: raster → upstream"),
    "schedule": ({}, {"diffusion__schedule": "cosine"}, "diffusion.schedule: linear → cosine"),
    "process": ({}, {"diffusion__process": "flow"}, "diffusion.process: ddpm → flow"),
    "prediction": (
        {"diffusion__process": "flow"},
        {"diffusion__process": "flow", "diffusion__prediction": "x"},
        "diffusion.prediction: velocity → x",
    ),
    "noise levels": ({}, {"diffusion__num_steps": 500}, "diffusion.num_steps: 1000 → 500"),
}


@pytest.mark.parametrize(
    "case",
    [
        case
        if case in ("heads of DiT", "prediction", "schedule")
        else pytest.param(case, marks=pytest.mark.slow)
        for case in MEANINGS
    ],
)
def test_equal_shapes_with_another_meaning_are_refused_or_taken_on_request(tmp_path, log, case):
    fields, changes, message = MEANINGS[case]
    path, params = written(tmp_path, components(**fields))
    new = components(**fields | changes)
    with pytest.raises(
        ConfigError, match=f"config.init_from={path}: different settings, .*: {message}"
    ) as caught:
        started(path, new)
    assert "--config.init_partial=True" in str(caught.value)
    assert_equal(started(path, new, partial=True), params)
    assert f"parameters change their meaning: {message}" in log.text


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {"model__dtype": "bfloat16"}),
        ({}, {"model__name": "DiG-B/2"}),
        ({"diffusion__process": "flow"}, {"diffusion__process": "flow", "diffusion__weight": "min_snr"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ({}, {"model__remat": "full"}),
                ({}, {"diffusion__loss": "rescaled_mse"}),
                ({}, {"model__skip_alignment": "upstream"}),
                ({}, {"model__mlp_hidden_size": 256}),
                (SKIPS, {"model__skip": "identity"}),
            ]
        ),
    ],
)
def test_settings_that_keep_the_function_may_change(tmp_path, fields, changes):
    path, params = written(tmp_path, components(**fields))
    assert_equal(started(path, components(**fields | changes)), params)


def test_parameters_of_another_resolution_are_taken_with_a_line(tmp_path, log):
    path, params = written(tmp_path, components(PETS))
    assert_equal(started(path, components(PETS, (8, 6, 1))), params)
    assert "initialized from images of 4 × 4 for images of 8 × 6" in log.text


def test_rows_of_the_label_table_follow_the_names_of_classes(tmp_path, log):
    path, params = written(tmp_path, components(PETS))
    new = components(("golden retriever", "bee", "Cat"))
    found, random = started(path, new), init_params(new)
    np.testing.assert_array_equal(table(found)[[0, 2, 3]], table(params)[[2, 0, 4]])
    np.testing.assert_array_equal(table(found)[1], table(random)[1])
    assert "2 of 3 classes are known by name, the others start afresh" in log.text
    del found["label_embed"], params["label_embed"]
    assert_equal(found, params)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """A model of `PETS`: (path, parameters)."""
    return written(tmp_path_factory.mktemp("pets"), components(PETS))


@settings(max_examples=12)
@given(st.permutations([*PETS, "b", "c"]), st.integers(1, 6))
def test_known_classes_keep_their_rows_and_new_ones_are_random(pets, order, count):
    path, params, new = *pets, components(order[:count])
    found, random = table(started(path, new)), table(init_params(new))
    np.testing.assert_array_equal(found[-1], table(params)[-1])
    for row, name in enumerate(order[:count]):
        expected = table(params)[PETS.index(name)] if name in PETS else random[row]
        np.testing.assert_array_equal(found[row], expected)


@pytest.mark.parametrize(
    ("old", "new", "rows", "message"),
    [
        (("cat", "dog"), ("ant", "bee"), [None, None], "0 of 2 classes are known by name"),
        (("0", "1", "2"), ("0", "1"), [0, 1], "2 of 2 classes are known by name"),
        (("0", "1"), ("ant", "bee"), [0, 1], "names of the 2 classes are unknown in one of the runs"),
        (("0", "1"), ("ant", "bee", "cow"), [None] * 3, "0 of 3 classes are known by name"),
        (("dog", "dog, puppy"), ("dog, puppy", "dog"), [1, 0], "2 of 2 classes are known by name"),
    ],
)
def test_classes_without_names_keep_their_order(tmp_path, log, old, new, rows, message):
    path, params = written(tmp_path, components(old))
    new = components(new)
    found, random = table(started(path, new)), table(init_params(new))
    for row, known in enumerate(rows):
        np.testing.assert_array_equal(found[row], random[row] if known is None else table(params)[known])
    assert message in log.text


def test_parameters_of_other_shapes_start_at_random_on_request(tmp_path, log):
    path, params = written(tmp_path, components())
    new = components(model__patch_size=4)
    with pytest.raises(ConfigError, match="different settings, .*: model.patch_size: 2 → 4. Restore"):
        started(path, new)
    found, random = started(path, new, partial=True), init_params(new)
    assert_equal(found["blocks"], params["blocks"])
    assert_equal(found["patch_embed"]["kernel"], np.asarray(random["patch_embed"]["kernel"]))
    assert "3 of " in log.text
    assert "patch_embed.kernel: got (4, 32); expected (16, 32)" in log.text


def test_a_model_with_and_one_without_classes_share_parameters_on_request(tmp_path, log):
    path, params = written(tmp_path, components(()))
    new = components(PETS)
    with pytest.raises(
        ConfigError, match=r"\d+ parameters do not match this model; the first is .*: got None"
    ):
        started(path, new)
    found = started(path, new, partial=True)
    assert_equal(found["blocks"], params["blocks"])
    assert table(found).shape == (5, 32)
    assert "start at random, 0 of the source are not used: " in log.text


def test_another_family_is_refused_without_its_options(tmp_path):
    path, _ = written(tmp_path, components())
    with pytest.raises(ConfigError, match="model family: DiG → DiT. Restore"):
        started(path, components(model__name="DiT-S/2"))


def test_dig_inherits_dit_block_by_block_but_for_the_skipped_mixers(tmp_path, log):
    depth = {"model__depth": 6}  # four groups of one block and two more, in DiT one group of six
    path, params = written(tmp_path, components(model__name="DiT-S/2", **depth))
    new = components(model__mlp="gelu", **depth)
    found, random = started(path, new, partial=True, skip="*.mixer.*, *.conv.*"), init_params(new)

    def block(tree, number):
        groups, rest = tree["blocks"]["groups"], tree["blocks"]["rest"]
        return jax.tree.map(lambda x: x[0], groups[number]) if number < 4 else rest[number - 4]

    for number in range(6):
        inherited = jax.tree.map(lambda x, number=number: x[number], params["blocks"]["groups"][0])
        for name in ("mlp", "modulation"):
            assert_equal(block(found, number)[name], inherited[name])
        for name in ("mixer", "conv"):
            assert_equal(block(found, number)[name], block(random, number)[name])
    for name in params.keys() - {"blocks"}:
        assert_equal(found[name], params[name])
    assert "config.init_skip: " in log.text and "blocks.rest.1.mixer.o_proj.kernel" in log.text


def test_a_pattern_that_matches_nothing_is_one_line(tmp_path):
    path, _ = written(tmp_path, components())
    with pytest.raises(
        ConfigError, match=r"config.init_skip: '\*.attn.\*' matches no parameter of this model"
    ):
        started(path, components(), skip="*.attn.*")


def test_a_source_of_which_no_block_fits_is_refused(tmp_path):
    path, _ = written(tmp_path, components(()))
    with pytest.raises(ConfigError, match="no parameter of the blocks matches this model, .*; the first is "):
        started(path, components((), model__hidden_size=16), partial=True)


def test_samplers_and_warm_starts_leave_the_heads_out(tmp_path):
    write_checkpoint(tmp_path, tiny_settings(model__name="DiT-S/2", auxiliary__sra_weight=1.0))
    for ema in (None, "params"):
        assert "auxiliary" not in read_model(tmp_path, ema)[2]
    read, step, params = read_model(tmp_path)
    write_parameter_file(tmp_path / "model.safetensors", read, step, params)
    new = tiny_components(model__name="DiT-S/2", auxiliary__sra_weight=1.0)
    fresh = jax.tree.map(jnp.asarray, random_params(new))
    for source in (tmp_path, tmp_path / "model.safetensors"):
        start = read_warm_start(str(source), new, abstract_state(new, mesh_of(1))["params"])
        started = complete(fresh, start.arrays, start.known_rows)
        jax.tree.map(np.testing.assert_array_equal, started["auxiliary"], fresh["auxiliary"])
        assert not np.array_equal(started["patch_embed"]["kernel"], fresh["patch_embed"]["kernel"])
