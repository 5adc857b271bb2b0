"""The shipped configs and their recipes."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

from dig_jax.cli.command_line import load_config
from dig_jax.components import Components, model_options
from dig_jax.config import Config, flattened, from_dict, to_dict
from dig_jax.data import ImageSpec
from dig_jax.data.registry import loader
from dig_jax.errors import ConfigError
from dig_jax.models.registry import find_model
from dig_jax.sampling.generation_spec import GenerationSpec
from dig_jax.training.train_setup import TrainSetup

IMAGENET = [f"{family}_{size}" for family in ("dig", "dit", "udig") for size in ("s", "b", "l", "xl")]
DIS = [f"dis_{size}" for size in ("s", "b", "m", "l", "h", "xl")]
SHIPPED = (
    *(
        f"{name}:{argument}"
        for name in IMAGENET
        for argument in ("256", "512", "1024", "256,ours", "256,paper", "1024,paper")
    ),
    *IMAGENET,
    *DIS,
    *(f"{name}:1024,paper" for name in DIS),
    *("dig_s:256,fast", "dig_b:256,fast", "dig_l:256,fast", "dig_xl:256,fast", "dig_xl:512,fast"),
    *("lightningdit", "lightningdit:B/1,512,ours", "jit", "jit:L/32,512"),
    *("cifar10", "cifar10:paper", "celeba64", "celeba64:paper"),
    *("dig_s:256,meanflow", "udig_b:256,meanflow", "dit_xl:1024,meanflow", "digits:meanflow"),
    *("base", "digits", "imagefolder", "imagefolder:pictures", "imagefolder_latents:pictures", "smoke"),
    *("imagefolder_small", "imagefolder_small:pictures"),
)


def shipped(name):
    """The ConfigDict of configs/NAME.py[:ARGUMENT,…] on the command line."""
    file, _, arguments = name.partition(":")
    return load_config(f"configs/{file}.py:{arguments}")


def test_all_shipped_configs_are_tested():
    files = {path.stem for path in Path("configs").glob("*.py")} - {"imagenet", "published", "recipes"}
    assert files == {name.partition(":")[0] for name in SHIPPED}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_valid_for_its_sources_and_survives_json(name):
    settings = from_dict(shipped(name).to_dict())
    assert isinstance(settings, Config)
    for group in (settings.data, *([settings.encode] if settings.encode.name else [])):
        assert group.options.keys() <= inspect.signature(loader(group.name)).parameters.keys() - {"split"}
    assert from_dict(json.loads(json.dumps(to_dict(settings)))) == settings


def arguments_before_recipe(file):
    """Default arguments of a config before its recipe, or None if it has no recipe."""
    parameters = inspect.signature(importlib.import_module(f"configs.{file}").get_config).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return (
        "".join(f"{defaults[name]}," for name in defaults if name != "recipe")
        if "recipe" in defaults
        else None
    )


FILES = {name.partition(":")[0]: None for name in SHIPPED}
WITH_RECIPES = [file for file in FILES if arguments_before_recipe(file) is not None]


@pytest.mark.parametrize("file", WITH_RECIPES)
def test_every_recipe_that_a_config_offers_can_be_trained_and_sampled(file):
    before = arguments_before_recipe(file)
    with pytest.raises(ConfigError) as error:
        shipped(f"{file}:{before}none")
    recipes = re.split(", | or ", str(error.value).rpartition("expected ")[2])
    config = importlib.import_module(f"configs.{file}")
    default = inspect.signature(config.get_config).parameters["recipe"].default
    assert default in recipes and set(recipes) - {default} <= set(re.findall(r"\w+", config.__doc__))
    for recipe in recipes:
        settings = from_dict(shipped(f"{file}:{before}{recipe}").to_dict())
        options = {"image_size": 8, "channels": 3, "num_classes": 10, **settings.data.options}
        classes = tuple(map(str, range(options["num_classes"])))
        spec = ImageSpec((options["image_size"], options["image_size"], options["channels"]), classes)
        components = Components(settings, spec)
        model_options(settings.model)
        TrainSetup.of(components)
        GenerationSpec.of(components)


# Zhu et al. 2025, section 4.1, and the released trainer and sampler.
PUBLISHED = {
    "model.dtype": "float32",
    "model.learn_sigma": True,
    "model.directions": 4,
    "model.conv": "after",
    "model.norm": "layer",
    "model.skip": "none",
    "model.skip_alignment": "upstream",
    "data.batch_size": 256,
    "data.flip": True,
    "diffusion.schedule": "linear",
    "diffusion.num_steps": 1000,
    "diffusion.loss": "mse",
    "training.steps": 400_000,
    "training.accumulation": 1,
    "training.label_dropout": 0.1,
    "training.ema_decays": [0.9999],
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup_steps": 0,
    "optimizer.schedule": "constant",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 0.0,
    "sampling.sampler": "ddpm",
    "sampling.steps": 250,
    "sampling.guidance_scale": 1.0,
    "sampling.guidance_channels": 3,
    "sampling.clip": False,
    "sampling.ema": "",
    "autoencoder.path": "stabilityai/sd-vae-ft-ema",
    "encode.options.crop": "adm",
    "encode.options.upright": False,
    "encode.options.heldout_fraction": 0.0,
}
PIXELS = {
    name: "" if name == "autoencoder.path" else x for name, x in PUBLISHED.items() if "encode" not in name
}
PAPER = {
    **{f"{name}:256,paper": PUBLISHED for name in IMAGENET},
    **{f"{name}:512,paper": PUBLISHED for name in IMAGENET},
    "cifar10:paper": PIXELS | {"training.steps": 273_000},
    "celeba64:paper": PIXELS | {"training.steps": 889_000, "training.label_dropout": 0.0},
}


@pytest.mark.parametrize("name", PAPER)
def test_the_recipe_of_the_paper_has_the_published_values(name):
    found = flattened(to_dict(from_dict(shipped(name).to_dict())))
    assert {field: found[field] for field in PAPER[name]} == PAPER[name]


@pytest.mark.parametrize("name", [*IMAGENET, "cifar10", "celeba64"])
def test_our_recipe_differs_from_the_published_one_only_where_it_says_so(name):
    resolution = "256," if name in IMAGENET else ""
    paper, ours = (
        flattened(to_dict(from_dict(shipped(f"{name}:{resolution}{recipe}").to_dict())))
        for recipe in ("paper", "ours")
    )
    said = {"model.dtype", "model.remat", "model.skip_alignment"}
    said |= {"sampling.guidance_scale", "sampling.guidance_channels", "sampling.clip"}
    said |= {"training.steps"} if name == "celeba64" else set()
    assert {field for field in ours if ours[field] != paper[field]} <= said
    assert (ours["model.dtype"], ours["model.remat"]) == ("bfloat16", "full")


@pytest.mark.parametrize("recipe", ["ours", "modern"])
def test_blocks_of_large_images_are_recomputed_one_by_one(recipe):
    remat = {size: shipped(f"dig_xl:{size},{recipe}").model.remat for size in (256, 512, 1024)}
    assert remat == {256: "full", 512: "full", 1024: "block"}


@pytest.mark.parametrize("name", IMAGENET)
def test_the_modern_recipe_is_the_default_and_differs_from_ours_only_where_it_says_so(name):
    ours, modern, default = (
        flattened(to_dict(from_dict(shipped(f"{name}{argument}").to_dict())))
        for argument in (":256,ours", ":256,modern", "")
    )
    assert modern == default
    assert {field for field in ours if ours[field] != modern[field]} == {
        "diffusion.process",
        "diffusion.times",
        "model.learn_sigma",
        "model.internal_head",
        "optimizer.clip_norm",
        "training.ema_decays",
        "sampling.sampler",
        "sampling.steps",
        "sampling.internal_guidance_scale",
        "sampling.guidance_interval",
    }
    family, size, _ = find_model(modern["model.name"])
    assert modern["model.internal_head"] == family.sizes[size].depth // 4


@pytest.mark.parametrize(
    ("name", "factor"),
    [("dig_s:256", 16), ("dig_b:256", 16), ("dig_l:256", 12), ("dig_xl:256", 12), ("dig_xl:512", 4)],
)
def test_the_fast_recipe_sees_as_many_images_in_larger_batches(name, factor):
    ours, fast = (from_dict(shipped(f"{name},{recipe}").to_dict()) for recipe in ("ours", "fast"))
    assert fast.data.batch_size == factor * ours.data.batch_size
    images = [settings.data.batch_size * settings.training.steps for settings in (ours, fast)]
    assert 0 <= images[1] - images[0] < fast.data.batch_size
    assert fast.optimizer.learning_rate == pytest.approx(1e-4 * factor**0.5, rel=1e-2)
    assert fast.training.ema_decays[0] == pytest.approx(0.9999**factor, abs=1e-6)
    assert fast.model == ours.model and fast.data.batch_size % 256 == 0


@pytest.mark.parametrize("name", ["dig_s:512,fast", "dig_xl:1024,fast", "dit_s:256,fast"])
def test_the_fast_recipe_of_a_model_that_was_not_planned_is_refused(name):
    with pytest.raises(ConfigError, match="no recipe 'fast' for .*; expected DiG-S/2 at 256 px, .*512 px"):
        shipped(name)


@pytest.mark.parametrize("pixels", [256, 512, 1024])
def test_latents_are_encoded_from_images_of_the_resolution(pixels):
    settings = from_dict(shipped(f"dig_xl:{pixels}").to_dict())
    assert settings.data.options == {
        "path": f"latents/imagenet_{pixels}",
        "image_size": pixels // 8,
        "channels": 4,
        "num_classes": 1000,
    }
    assert settings.encode.options["image_size"] == pixels
    assert settings.encode.batch_size * pixels**2 == 32 * 256**2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dig_s.py:128", "invalid resolution '128'; expected 256, 512 or 1024"),
        ("dig_s.py:256,papr", "invalid recipe 'papr' for DiG-S/2; expected modern, meanflow, ours or paper"),
        ("dig_s.py:256,paper,3", "invalid recipe 'paper,3' for DiG-S/2; expected modern, meanflow, ours or"),
        ("celeba64.py:64", "invalid recipe '64' for DiG-S/2; expected modern, meanflow, ours or paper"),
        ("dis_m.py:256,meanflow", "invalid recipe 'meanflow' for DiS-M/2; expected modern, ours or paper"),
    ],
)
def test_an_invalid_argument_of_a_config_raises_one_line(text, message):
    with pytest.raises(ConfigError, match=f"--config=configs/{text}: {message}"):
        load_config(f"configs/{text}")


def test_a_directory_may_have_commas_in_its_name():
    assert load_config("configs/imagefolder.py:a,b").data.options.path == "a,b"
