"""From images to a model of their latents and back to images, like with ImageNet but small."""

import dataclasses
import functools
import io
import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ended_runs import GLOO, environment, joined
from flax import nnx
from PIL import Image
from safetensors.numpy import save_file
from test_data_images import noise
from test_data_tfds import library, prepare  # noqa: F401 (a fixture)
from tiny_autoencoder import write_autoencoder

from dig_jax import config
from dig_jax.checkpoints.reader import read_config
from dig_jax.cli import number_lists
from dig_jax.convert import command as convert
from dig_jax.convert import to_torch_state_dict
from dig_jax.models import create_model
from dig_jax.sampling.sample import sample
from dig_jax.training.train import train

pytestmark = pytest.mark.filterwarnings("default")  # TFDS and its imports have warnings of their own

ROOT = Path(__file__).parent.parent
CLASSES = ("n01440764", "n02099601", "n02123045")  # tench, golden retriever, tabby
PER_CLASS = 7
CONFIG = """
from configs import dig_s

def get_config(source):
    c = dig_s.get_config("256", "ours")
    c.model.depth, c.model.hidden_size, c.model.num_heads = 2, 32, 1
    c.autoencoder.path = {autoencoder!r}
    c.data.options.update(path=f"{root}/latents_{{source}}", image_size=8, num_classes=3)
    c.data.batch_size = 8
    c.encode.name, c.encode.batch_size, c.encode.shard_size = source, 2, 1
    c.encode.options = {{
        "image_folder": {{"path": {folder!r}, "heldout_fraction": 0.1}},
        "tfds": {{"dataset": "pictures", "data_dir": {tfds!r}}},
    }}[source] | {{"image_size": 16}}
    c.training.steps = 4
    c.logging.every_steps, c.logging.heldout_every_steps, c.logging.tensorboard = 1, 2, False
    c.checkpoint.every_steps = 4
    c.mesh.data = 1
    c.sampling.every_steps, c.sampling.images_per_class, c.sampling.steps = 0, 1, 2
    return c
"""


def pictures():
    """Yield name, class and content of JPEGs of several sizes and modes, two PNGs, and a corrupt file."""
    for label in range(len(CLASSES)):
        for number in range(PER_CLASS):
            image, name = Image.fromarray(noise(16 + 9 * number, 40 - number, seed=number)), "jpg"
            if number == 1:
                image = image.convert("L")
            elif number == 2:
                image = image.convert("CMYK")
            elif number == 3:
                image, name = image.convert("RGBA"), "png"
                image.putalpha(100)
            elif number == 4:
                image, name = image.convert("P"), "png"
            file = io.BytesIO()
            image.save(file, {"jpg": "JPEG", "png": "PNG"}[name])
            is_corrupt = (label, number) == (1, 5)
            yield f"{number:02}.{name}", label, file.getvalue()[: 300 if is_corrupt else None]


@pytest.fixture(scope="module")
def run(library, tmp_path_factory):  # noqa: F811
    """Return a function that starts main.py with a source of the images; `.root` has all files."""
    root = tmp_path_factory.mktemp("imagenet")
    found = list(pictures())
    for name, label, content in found:
        path = root / "folder" / CLASSES[label] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    features = {
        "image": library.features.Image(shape=(None, None, 3)),
        "label": library.features.ClassLabel(names=list(CLASSES)),
    }

    def example(number):
        _, label, content = found[number]
        return {"image": io.BytesIO(content), "label": label}

    prepare(library, root / "tfds", "Pictures", features, example, {"train": len(found), "validation": 3})
    text = CONFIG.format(
        root=root,
        autoencoder=str(write_autoencoder(root / "autoencoder")),
        folder=str(root / "folder"),
        tfds=str(root / "tfds"),
    )
    (root / "config.py").write_text(text)

    def start(source, *arguments):
        flags = [f"--config={root}/config.py:{source}"] if source else []
        command = [sys.executable, "main.py", *flags, *arguments]
        env = environment(root / "compiled") | GLOO | {"NO_GCE_CHECK": "true"}
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    start.root = root
    return start


def finished(process, status=0, message=""):
    """Wait for a process with this status and message, and return its log."""
    _, stderr = process.communicate()
    assert process.returncode == status, stderr
    assert message in stderr
    return stderr


def files(cache):
    """Return the descriptions of finished files with the time of their last change."""
    return {path: path.stat().st_mtime_ns for path in cache.glob("*/*.json")}


def killed(process, cache, count, number):
    """Send a signal to a process when `count` files are finished."""
    while process.poll() is None and len(files(cache)) < count:
        time.sleep(0.001)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert len(files(cache)) >= count, stderr


@pytest.mark.parametrize("source", ["image_folder", pytest.param("tfds", marks=pytest.mark.slow)])
def test_images_become_latents_a_model_of_them_and_images_again(run, source):
    cache, workdir = run.root / f"latents_{source}", run.root / f"run_{source}"
    if source == "image_folder":  # a kill does not depend on the source
        killed(run(source, "--mode=encode"), cache, 3, signal.SIGKILL)
        assert len(files(cache)) < 3 * PER_CLASS
        assert not (cache / "index.json").exists()
    before = files(cache)
    log = finished(run(source, "--mode=encode"))
    assert ("05.jpg" if source == "image_folder" else "record") in log
    assert before.items() <= files(cache).items()
    index = json.loads((cache / "index.json").read_text())
    assert index["class_names"] == list(CLASSES)
    shards = [shard for shards in index["splits"].values() for shard in shards]
    extra = 3 * (source == "tfds")  # its validation split
    assert sum(shard["images"] for shard in shards) == len(list(pictures())) - 1 + extra

    settings = config.from_dict(runpy.run_path(run.root / "config.py")["get_config"](source).to_dict())
    train(settings, workdir)
    losses = [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    with Image.open(workdir / "samples.png") as grid:
        assert grid.height > 3 * 16

    finished(run(source, f"--workdir={workdir}", "--mode=sample", "--labels=golden retriever,tench,2"))
    with np.load(workdir / "generated.npz") as drawn:
        assert (drawn["arr_0"].shape, drawn["arr_0"].dtype) == ((3, 16, 16, 3), np.uint8)
        np.testing.assert_array_equal(drawn["labels"], [1, 0, 2])
        assert len(np.unique(drawn["arr_0"])) > 20
    with Image.open(workdir / "generated.png") as grid:
        assert grid.format == "PNG"


def test_other_peoples_weights_become_images(run, tmp_path):
    sizes = {"depth": 1, "hidden_size": 32, "num_heads": 2}
    model = create_model("DiT-S/2", input_size=8, num_classes=1000, in_channels=4, rngs=nnx.Rngs(0), **sizes)
    save_file(to_torch_state_dict(model), tmp_path / "dit.safetensors")
    workdir = tmp_path / "dit"
    assert convert.main([str(tmp_path / "dit.safetensors"), str(workdir), "--num_heads=2"]) == 0
    settings = read_config(workdir)
    settings = dataclasses.replace(
        settings,
        autoencoder=dataclasses.replace(settings.autoencoder, path=str(run.root / "autoencoder")),
        sampling=dataclasses.replace(settings.sampling, steps=2, batch_size=2),
    )
    labels = functools.partial(number_lists.labels, "golden retriever")
    sample(settings, workdir, labels, np.array([0, 1]))
    with np.load(workdir / "generated.npz") as drawn:
        assert drawn["arr_0"].shape == (2, 16, 16, 3)
        np.testing.assert_array_equal(drawn["labels"], [207, 207])


@pytest.mark.slow
def test_processes_share_encoding_training_and_sampling(run, tmp_path):
    one, two = (f"--config.data.options.path={tmp_path}/{name}" for name in ("one", "two"))
    finished(run("image_folder", one, "--mode=encode"))
    flags = joined(2)
    both = [run("image_folder", two, "--mode=encode", *own) for own in flags]
    killed(both[0], tmp_path / "two", 4, signal.SIGKILL)
    both[1].communicate()
    assert both[1].returncode
    assert len(files(tmp_path / "two")) < 3 * PER_CLASS
    for process in [run("image_folder", two, "--mode=encode", *own) for own in joined(2)]:
        finished(process)
    kept, found = (
        {path.relative_to(tmp_path / n): path for path in files(tmp_path / n)} for n in ("one", "two")
    )
    assert kept.keys() == found.keys()
    indices = [json.loads((tmp_path / name / "index.json").read_text()) for name in ("one", "two")]
    assert indices[0]["splits"] == indices[1]["splits"]

    settings = [
        two,
        "--config.training.steps=2",
        "--config.sampling.batch_size=2",
        f"--workdir={tmp_path}/run",
    ]
    both = [run("image_folder", *settings, "--config.mesh.data=-1", *own) for own in joined(2)]
    for process in both:
        finished(process)
    drawn = []
    for processes in (1, 2):
        for process in [
            run("image_folder", *settings, "--mode=sample", "--seeds=0-8", *own) for own in joined(processes)
        ]:
            finished(process)
        with np.load(tmp_path / "run" / "generated.npz") as file:
            drawn.append(dict(file))
    np.testing.assert_array_equal(drawn[1]["arr_0"], drawn[0]["arr_0"])
    np.testing.assert_array_equal(drawn[1]["seeds"], range(9))
