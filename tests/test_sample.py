import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dig_jax import ConfigError, Sampler
from dig_jax.errors import UserError
from dig_jax.export.export import export
from dig_jax.files.lock import writer_lock
from dig_jax.sampling import image_set
from dig_jax.sampling.image_set import ImageSet, replacing
from dig_jax.sampling.sample import sample
from dig_jax.testing import PlainComponents, tiny_settings, write_checkpoint


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draw a set in `draw.workdir` and return the arrays of generated.npz; `draw.drawn` lists the seeds."""
    (tmp_path / "run").mkdir()

    def draw(labels=None, seeds=None, params=(), output=None, **changes):
        settings = tiny_settings(**{"sampling__batch_size": 2, "sampling__steps": 3} | changes)
        draw.sampler = sampler = Sampler(PlainComponents(settings), dict(params), step=7)
        monkeypatch.setattr("dig_jax.sampling.sample.load", lambda *_, **__: sampler)
        counted = Sampler.counted

        def noted(self, labels, *, seeds):
            images, evaluations = counted(self, labels, seeds=seeds)
            draw.drawn += np.asarray(seeds).tolist()
            return images, evaluations

        with monkeypatch.context() as patched:
            patched.setattr(Sampler, "counted", noted)
            sample(settings, draw.workdir, lambda names: labels, seeds, output)
        with np.load(output or draw.workdir / "generated.npz") as file:
            return dict(file)

    draw.drawn, draw.workdir = [], tmp_path / "run"
    return draw


def interrupt(*_):
    raise KeyboardInterrupt


def leave_chunks(draw, monkeypatch, **arguments):
    """Draw all chunks of a set, but not generated.npz; return the directory."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ImageSet, "collect", interrupt)
        draw(**arguments)
    return draw.workdir / "generated"


def test_sampled_images_are_written_as_evaluators_read_them(draw):
    written = draw([1, 4, 2], np.array([7]))
    assert set(written) == {"arr_0", "labels", "seeds", "set"}
    assert written["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(written["arr_0"], draw.sampler([1, 4, 2], seeds=7))
    np.testing.assert_array_equal(written["labels"], [1, 4, 2])
    np.testing.assert_array_equal(written["seeds"], [7, 7, 7])
    with Image.open(draw.workdir / "generated.png") as picture:
        assert picture.format == "PNG"
    assert {path.name for path in draw.workdir.iterdir()} == {"generated.npz", "generated.png"}


def test_latents_without_an_autoencoder_have_no_grid(draw):
    written = draw(data__options={"image_size": 4, "channels": 4, "num_classes": 5, "length": 60})
    assert written["arr_0"].shape == (5, 4, 4, 4)
    for name in ("labels", "seeds"):
        np.testing.assert_array_equal(written[name], range(5))
    assert [path.name for path in draw.workdir.iterdir()] == ["generated.npz"]


def test_an_interrupted_set_is_completed_without_redrawing(draw, monkeypatch):
    seeds = np.arange(7)
    whole = draw(seeds=seeds, output=draw.workdir / "whole.npz")
    assert draw.drawn == seeds.tolist()
    draw.drawn.clear()

    def broken(self, x):
        if len(draw.drawn) == 4:
            raise KeyboardInterrupt
        return pictures(self, x)

    pictures = Sampler.decode
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Sampler, "decode", broken)
        draw(seeds=seeds)
    chunks = draw.workdir / "generated"
    assert sorted(path.name for path in chunks.iterdir()) == ["00000000.npy", "00000002.npy", "set.json"]
    (chunks / "00000002.npy").write_bytes((chunks / "00000002.npy").read_bytes()[:-1])  # corrupt
    again = draw(seeds=seeds)
    assert draw.drawn == [0, 1, 2, 3, 2, 3, 4, 5, 6]
    assert whole.keys() == again.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(again[name], values)
    assert not chunks.exists()


def test_processes_share_the_chunks_of_a_set(draw, tmp_path):
    seeds = np.arange(7)
    whole = draw(seeds=seeds)["arr_0"]
    images = ImageSet(tmp_path / "set.npz", draw.sampler, seeds % 5, seeds)
    images.claim()
    for index in (2, 0, 1):
        images.draw(index=index, count=3)
    np.testing.assert_array_equal(np.concatenate(list(images.chunks())), whole)
    assert draw.sampler.output_shape == whole.shape[1:]


def test_chunks_of_another_set_are_neither_used_nor_deleted(draw, monkeypatch):
    leave_chunks(draw, monkeypatch, seeds=np.arange(4))
    before = {path: path.read_bytes() for path in (draw.workdir / "generated").iterdir()}
    assert len(before) == 3
    for changes, message in [
        ({"sampling__steps": 2}, "steps: 3 → 2"),
        ({"seeds": np.arange(5)}, "images: 4 → 5"),
        ({"seeds": np.arange(1, 5)}, "labels and seeds: "),
    ]:
        with pytest.raises(
            ConfigError, match=f"contains a different set of images .*{message}.* --output=FILE.npz"
        ):
            draw(**{"seeds": np.arange(4)} | changes)
    assert before == {path: path.read_bytes() for path in (draw.workdir / "generated").iterdir()}
    (draw.workdir / "generated" / "set.json").write_text("[")
    with pytest.raises(UserError, match=r"cannot read .*set.json: .*; delete "):
        draw(seeds=np.arange(4))


def test_a_corrupt_chunk_is_drawn_again(draw, monkeypatch):
    seeds = np.arange(4)
    whole = draw(seeds=seeds, output=draw.workdir / "whole.npz")["arr_0"]
    leave_chunks(draw, monkeypatch, seeds=seeds)
    (draw.workdir / "generated" / "00000002.npy").write_bytes(b"")
    np.testing.assert_array_equal(draw(seeds=seeds)["arr_0"], whole)


def test_chunks_are_never_left_without_set_json(draw, monkeypatch):
    deleted, unlink = [], Path.unlink

    def interrupted(path, **options):
        if path.suffix == ".npy" and deleted:
            raise KeyboardInterrupt
        deleted.extend([path] if path.suffix == ".npy" else [])
        unlink(path, **options)

    def rmtree(directory):
        for path in sorted(directory.iterdir(), reverse=True):  # in any order
            interrupted(path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", interrupted)
        patched.setattr(shutil, "rmtree", rmtree)
        draw(seeds=np.arange(4))
    assert (draw.workdir / "generated" / "set.json").exists()
    np.testing.assert_array_equal(draw(seeds=np.arange(4))["seeds"], range(4))


def test_other_files_in_the_directory_are_left_alone(draw):
    (draw.workdir / "generated").mkdir()
    (draw.workdir / "generated" / "best.png").write_text("a picture")
    with pytest.raises(ConfigError, match="generated contains other files; choose another name"):
        draw(seeds=np.arange(2))
    assert (draw.workdir / "generated" / "best.png").read_text() == "a picture"


def test_chunks_of_other_parameters_or_another_precision_are_not_used(draw, monkeypatch):
    leave_chunks(draw, monkeypatch, seeds=np.arange(2))
    with pytest.raises(ConfigError, match="different set of images .autoencoder.dtype: float32 → bfloat16"):
        draw(seeds=np.arange(2), autoencoder__dtype="bfloat16")
    with pytest.raises(ConfigError, match="different set of images .values of the parameters: "):
        draw(seeds=np.arange(2), params={"bias": np.ones(3, np.float32)})


@pytest.mark.parametrize("name", ["00000000.npy", "generated.npz"])
def test_a_full_disk_is_one_line_and_the_set_can_be_completed(draw, monkeypatch, name):
    @contextlib.contextmanager
    def full(path):
        raise OSError(f"{path.name} requested and 0 written")
        yield

    message = f"cannot write to .*: {name} requested"
    with monkeypatch.context() as patched, pytest.raises(UserError, match=message):
        patched.setattr(
            "dig_jax.sampling.image_set.replacing",
            lambda path: (full if path.name == name else replacing)(path),
        )
        draw(seeds=np.arange(2))
    assert draw(seeds=np.arange(2))["arr_0"].shape[0] == 2


@pytest.fixture
def finished(draw):
    """The files of a finished set of three images."""
    draw(seeds=np.arange(3))
    draw.drawn.clear()
    return contents(draw.workdir)


def contents(directory):
    return {path: path.read_bytes() for path in directory.iterdir()}


def test_a_finished_set_is_not_drawn_again(draw, finished, caplog):
    caplog.set_level("INFO")
    draw(seeds=np.arange(3))
    assert draw.drawn == [] and contents(draw.workdir) == finished
    assert f"{draw.workdir}/generated.npz already holds these 3 images; nothing was drawn" in caplog.messages


def test_chunks_that_a_killed_run_left_beside_its_finished_set_are_deleted(draw, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ImageSet, "delete", interrupt)
        draw(seeds=np.arange(3))
    assert (draw.workdir / "generated").exists()
    draw.drawn.clear()
    draw(seeds=np.arange(3))
    assert draw.drawn == []
    assert {path.name for path in draw.workdir.iterdir()} == {"generated.npz", "generated.png"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": np.arange(2)}, "images: 3 → 2"),
        ({"seeds": np.arange(3), "sampling__steps": 2}, "steps: 3 → 2"),
        ({"seeds": np.arange(3), "params": {"bias": np.ones(3, np.float32)}}, "values of the parameters: "),
    ],
)
def test_a_finished_set_is_not_replaced_by_another_one(draw, finished, changes, message):
    with pytest.raises(ConfigError, match=f"holds another set of images .*{message}.*--output=FILE.npz"):
        draw(**changes)
    assert draw.drawn == [] and contents(draw.workdir) == finished
    draw(**changes, output=draw.workdir / "another.npz")
    assert draw.drawn == changes["seeds"].tolist()
    assert contents(draw.workdir).items() >= finished.items()


@pytest.mark.parametrize("content", [b"", b"not a zip", "another program's"])
def test_a_file_of_somebody_else_is_not_replaced(draw, content):
    path = draw.workdir / "generated.npz"
    if isinstance(content, str):
        np.savez(path, arr_0=np.zeros(3))
    else:
        path.write_bytes(content)
    before = contents(draw.workdir)
    with pytest.raises(ConfigError, match=r"generated.npz exists and does not say what it holds: .*--output"):
        draw(seeds=np.arange(3))
    assert contents(draw.workdir) == before
    path.unlink()
    (draw.workdir / "generated.png").write_bytes(b"a picture")
    with pytest.raises(ConfigError, match=r"generated.png exists; choose another name with --output"):
        draw(seeds=np.arange(3))
    assert draw.drawn == []
    assert [path.name for path in draw.workdir.iterdir()] == ["generated.png"]


def test_a_second_sampler_of_a_set_is_refused_and_one_of_another_set_is_not(draw):
    with writer_lock(draw.workdir / ".generated.npz.lock", "the set"):
        with pytest.raises(UserError, match=r"the set of images .*generated.npz is in use by process"):
            draw(seeds=np.arange(2))
        assert [path.name for path in draw.workdir.iterdir()] == [".generated.npz.lock"]
        draw(seeds=np.arange(2), output=draw.workdir / "another.npz")


def test_a_grid_that_cannot_be_written_is_a_warning(draw, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "generated.png")

    monkeypatch.setattr(image_set, "save_grid", full)
    assert len(draw(seeds=np.arange(2))["arr_0"]) == 2
    assert [path.name for path in draw.workdir.iterdir()] == ["generated.npz"]
    assert "could not write" in caplog.text and "No space left on device" in caplog.text


@pytest.mark.parametrize("name", ["x.txt", "x", "x.png"])
def test_the_output_must_be_an_npz_file(draw, name):
    with pytest.raises(ConfigError, match=f"invalid --output=.*{name}; expected a name that ends with .npz"):
        draw(seeds=np.arange(2), output=draw.workdir / name)


def test_a_run_that_may_only_be_read_and_an_exported_file_can_be_sampled_elsewhere(tmp_path):
    settings = tiny_settings(sampling__steps=2)
    run, file = tmp_path / "run", tmp_path / "x.safetensors"
    write_checkpoint(run, settings)
    export(settings, run, file)
    with pytest.raises(ConfigError, match=f"missing --output: --workdir={file} is a file; expected --output"):
        sample(settings, file)
    for source in (run, file):
        source.chmod(0o555)
        sample(settings, source, seeds=np.arange(2), output=tmp_path / "new" / f"{source.name}.npz")
    sets = [np.load(path)["arr_0"] for path in (tmp_path / "new").glob("*.npz")]
    np.testing.assert_array_equal(*sets)
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints"]


def test_set_json_holds_what_the_images_depend_on(draw, monkeypatch):
    leave_chunks(draw, monkeypatch, seeds=np.arange(4), sampling__ema="0.99")
    described = json.loads((draw.workdir / "generated" / "set.json").read_text())
    expected = {"step": 7, "parameters": "0.99", "sampler": "ddim", "steps": 3, "images": 4}
    expected["guidance_channels"] = 0  # as in config.json, which older versions wrote, too
    assert described | expected == described


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ([9], {}, r"--labels.*: label out of range: got 9"),
        (None, {"sampling__steps": 1}, r"config.sampling: too few steps: got 1; expected at least 2"),
    ],
)
def test_invalid_samples_name_the_setting(labels, changes, message, tmp_path):
    settings = tiny_settings(**changes)
    write_checkpoint(tmp_path, settings)
    with pytest.raises(ConfigError, match=message):
        sample(settings, tmp_path, lambda names: labels)
