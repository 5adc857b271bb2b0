"""Parameters with a model card, in a folder and on the Hugging Face Hub."""

import json
import shutil
import sys

import huggingface_hub
import huggingface_hub.constants
import jax
import numpy as np
import pytest
from fake_hub import TOKEN, running_hub

import dig_jax
from dig_jax import CheckpointError, ConfigError, config
from dig_jax.checkpoints.frozen_model import read_frozen_model
from dig_jax.checkpoints.parameter_file import write_parameter_file
from dig_jax.checkpoints.reader import read_model
from dig_jax.components import Components
from dig_jax.export.export import export, push
from dig_jax.files.atomic import write_json
from dig_jax.files.jsonl import append_row
from dig_jax.testing import mesh_of, tiny_settings, write_checkpoint
from dig_jax.training.state import abstract_state, init_params
from dig_jax.training.warm_start import complete, read_warm_start

START = {
    "step": 0,
    "devices": "8 × TPU v6e",
    "python": "3.12.1",
    "versions": {"jax": "0.11.0"},
    "command": "secret",
}


@pytest.fixture(scope="module")
def run(run, tmp_path_factory):
    """The workdir with scores, starts and samples, and the trees of parameters."""
    path = shutil.copytree(run[0], tmp_path_factory.mktemp("run") / "run")
    write_json(
        path / "scores.json",
        {"fid": 12.3456, "num_images": 500, "seeded": True, "step": 7, "guidance_scale": 9.0},
    )
    append_row(path / "starts.jsonl", START)
    (path / "samples.png").write_bytes(b"picture")
    return path, run[1]


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """A folder that tests must not change."""
    path = tmp_path_factory.mktemp("exported") / "digits"
    export(tiny_settings(), run[0], path, license="cc-by-4.0")
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(
            "huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_card_tells_model_data_training_scores_environment_and_license(exported):
    card = (exported / "README.md").read_text()
    assert card.startswith('---\nlicense: "cc-by-4.0"\nlibrary_name: "dig-jax"\n')
    for text in (
        "# digits\n",
        "generates images of 5 classes in 4×4 pixels",
        "![Samples](samples.png)",
        "| data | fake |",
        "| steps | 7 |\n| batch size | 8 |\n| images seen | 56 |",
        "| parameters | average 0.9 |",
        "| optimizer.learning_rate | 0.001 |",
        "| model.name | DiG-S/2 |\n| model.depth | 1 |",
        "| fid | 12.35 |\n| num_images | 500 |\n\n## Environment",
        "| devices | 8 × TPU v6e |\n| python | 3.12.1 |\n| jax | 0.11.0 |",
        "## License\n\nThe parameters: cc-by-4.0.",
    ):
        assert text in card, text
    assert "secret" not in card
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "samples.png"
    ]  # fmt: skip
    stored = json.loads((exported / "config.json").read_text())
    assert config.from_dict(stored["config"]) == tiny_settings()


def test_the_card_counts_the_images_of_all_batch_sizes(run, exported, tmp_path):
    """The last steps of the run had batches of 16; an exported file does not know the number of images."""
    settings, checkpoint = tiny_settings(data__batch_size=16), run[0] / "checkpoints" / "7"
    for number, source in enumerate((run[0], checkpoint, exported)):
        export(settings, source, tmp_path / f"{number}")
    cards = [(tmp_path / f"{number}" / "README.md").read_text() for number in range(3)]
    assert ["| images seen | 56 |" in card for card in cards] == [True, True, False]
    assert "images seen" not in cards[2]


def test_scores_of_other_parameters_are_left_out(run, tmp_path):
    write_checkpoint(tmp_path / "run", tiny_settings(), step=8)
    (tmp_path / "run/scores.json").write_text((run[0] / "scores.json").read_text())
    export(tiny_settings(), tmp_path / "run", tmp_path / "new")
    card = (tmp_path / "new/README.md").read_text()
    assert "## Scores\n\nNot evaluated." in card
    assert 'license: "unknown"' in card and "samples.png" not in card


def test_a_folder_loads_and_is_never_overwritten(run, exported, caplog):
    caplog.set_level("INFO")
    components, step, params = read_model(exported)
    assert (components.config, step) == (tiny_settings(), 7)
    assert_equal(params, run[1]["0.9"])
    export(tiny_settings(), run[0], exported)
    assert f"{exported} already holds step 7 (0.9)" in caplog.messages
    with pytest.raises(ConfigError, match=f"--output={exported} exists and holds something else"):
        export(tiny_settings(sampling__ema="params"), run[0], exported)


def test_a_converted_file_and_an_exported_folder_are_exported_with_a_card(exported, tmp_path):
    settings = tiny_settings(autoencoder__path="somewhere", data__batch_size=2)
    source = tmp_path / "converted.safetensors"
    components, _, params = read_model(exported)
    write_parameter_file(source, components.with_config(settings), 0, params)
    export(settings, source, tmp_path / "model")
    card = (tmp_path / "model/README.md").read_text()
    assert "in 4×4 latents" in card and "| steps | 0; trained by other code, or not at all |" in card
    assert "fake" not in card and "Not evaluated." in card
    export(tiny_settings(), exported, tmp_path / "again")
    for path, expected in ((tmp_path / "model", settings), (tmp_path / "again", tiny_settings())):
        components, _, found = read_model(path)
        assert components.config == expected
        assert_equal(found, params)
    assert (tmp_path / "again/samples.png").read_bytes() == b"picture"


def test_a_license_needs_a_card(run, tmp_path):
    with pytest.raises(
        ConfigError, match="unsupported --license=mit of --output=.*x.safetensors; expected a folder"
    ):
        export(tiny_settings(), run[0], tmp_path / "x.safetensors", "mit")


def test_a_model_is_pushed_to_the_hub_and_loaded_from_it(run, hub, caplog):
    caplog.set_level("INFO", logger="dig_jax")
    push(tiny_settings(), run[0], "hf://someone/digits", "mit")
    assert caplog.messages[-1] == (
        f"exported step 7 (0.9) with a model card to {hub.url}/someone/digits/commit/{'0' * 40}"
    )
    files = hub.repositories["someone/digits"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert 'dig_jax.load("hf://someone/digits")' in files["README.md"].decode()
    assert hub.messages == ["Step 7 (0.9)"]
    sampler = dig_jax.load("hf://someone/digits")
    assert (sampler.step, sampler.components.config) == (7, tiny_settings())
    assert_equal(sampler.params, run[1]["0.9"])

    files["README.md"] = b"edited"
    push(tiny_settings(sampling__ema="params"), run[0], "hf://someone/digits")
    assert files["README.md"] == b"edited"
    assert hub.messages[1:] == ["Step 7 (params)"]


def test_training_starts_from_a_model_of_the_hub(run, exported, hub):
    hub.repositories["someone/digits"] = {"model.safetensors": (exported / "model.safetensors").read_bytes()}
    components = Components(tiny_settings())
    start = read_warm_start(
        "hf://someone/digits", components, abstract_state(components, mesh_of(1))["params"]
    )
    assert_equal(complete(init_params(components), start.arrays, start.known_rows), run[1]["0.9"])


def test_a_weaker_model_and_a_teacher_come_from_the_hub(exported, hub):
    hub.repositories["someone/digits"] = {"model.safetensors": (exported / "model.safetensors").read_bytes()}
    components, _, params = read_model(exported)
    spec, found = read_frozen_model("weak_model", "hf://someone/digits", components, None)
    assert spec == components.model_spec
    assert_equal(found, params)


def test_errors_of_the_hub_are_one_line(run, hub, monkeypatch):
    def message(function, *arguments):
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            function(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "got hf://digits; expected hf://OWNER/NAME" in message(dig_jax.load, "hf://digits")
    assert message(dig_jax.load, "hf://someone/missing") == (
        "hf://someone/missing: the download from the Hugging Face Hub failed"
        " (no such repository, or it is private; then run `hf auth login`)"
    )
    hub.repositories["someone/else"] = {"README.md": b""}
    assert "no such file" in message(dig_jax.load, "hf://someone/else")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    upload = push, tiny_settings(), run[0], "hf://someone/digits"
    assert "cannot upload to hf://someone/digits: no permission; run `hf auth login`" in message(*upload)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in message(*upload)
    assert "HF_HUB_OFFLINE is set" in message(dig_jax.load, "hf://someone/missing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "an upload to the Hugging Face Hub needs the package huggingface_hub" in message(*upload)
    assert hub.repositories.keys() == {"someone/else"}
