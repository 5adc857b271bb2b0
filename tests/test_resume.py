import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from ended_runs import FIELDS, assert_ended_alike, records, state_at
from jax_options import unoptimized

from configs import smoke
from dig_jax import components, config
from dig_jax.data.fake import FakeSource
from dig_jax.errors import CheckpointError, ConfigError, UserError
from dig_jax.export.export import export
from dig_jax.sampling.sample import sample
from dig_jax.training import hooks, loop, train
from dig_jax.training.workdir import claim_workdir


def settings(**fields) -> config.Config:
    """The smoke config with FIELDS and with group__field=value."""
    c = smoke.get_config()
    c.update_from_flattened_dict(FIELDS | {name.replace("__", "."): value for name, value in fields.items()})
    return config.from_dict(c.to_dict())


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", autouse=True)
def compiled_once(patch):
    """Runs share their compiled programs, which are not optimized."""
    compile_step, compiled = train.compile_train_step, {}

    def compile_once(components, mesh, state, *others):
        fields = config.to_dict(components.config)
        fields["training"].pop("steps")  # the learning rate is constant
        for name in ("init_from", "checkpoint", "logging", "sampling"):
            fields.pop(name)
        key = (str(fields), mesh, others)
        if key not in compiled:
            compiled[key] = compile_step(components, mesh, state, *others)
        return compiled[key]

    patch.setattr(train, "compile_train_step", compile_once)
    with unoptimized():
        yield


@pytest.fixture(scope="module")
def drawn(patch):
    """The samplers whose images would have been drawn; drawing is off."""
    samplers = []
    patch.setattr(hooks, "draw_samples", lambda sampler, workdir: samplers.append(sampler))
    return samplers


@pytest.fixture(scope="module")
def trained(tmp_path_factory, drawn):
    """An uninterrupted run, which tests must not change."""
    workdir = tmp_path_factory.mktemp("trained")
    train.train(settings(), workdir)
    return workdir


@pytest.fixture
def copied(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def interrupt(patch: pytest.MonkeyPatch, at: int) -> None:
    """Interrupt the next run when it gets its batch number `at`."""
    to_global, calls = loop.to_global, iter(range(1, at))

    def interrupted(batch, mesh):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return to_global(batch, mesh)

    patch.setattr(loop, "to_global", interrupted)


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_an_interrupted_run_resumes_bit_identically(trained, tmp_path, at):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, at)
        train.train(settings(), tmp_path)
    train.train(settings(), tmp_path)
    assert_ended_alike(tmp_path, trained, 6)


def test_raising_the_number_of_steps_equals_having_set_it_from_the_start(trained, tmp_path):
    train.train(settings(training__steps=3), tmp_path)
    train.train(settings(), tmp_path)
    assert_ended_alike(tmp_path, trained, 6)


def test_checkpoints_are_saved_by_time(tmp_path, drawn):
    fields = {"every_steps": 1000, "every_minutes": 1e-9}
    train.train(settings(training__steps=3, **{f"checkpoint__{k}": v for k, v in fields.items()}), tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_a_finished_run_is_drawn_again_but_not_trained(trained, copied, drawn):
    before = len(drawn)
    train.train(settings(), copied)
    train.train(settings(mesh__data=1), copied)
    assert [sampler.step for sampler in drawn[before:]] == [6, 6]
    assert_ended_alike(copied, trained, 6)


def test_fewer_steps_than_a_run_has_done_are_refused(copied, drawn):
    before = len(drawn)
    with pytest.raises(
        ConfigError, match=r"invalid config.training.steps=4; expected at least 6, .* has done"
    ):
        train.train(settings(training__steps=4), copied)
    assert len(drawn) == before


def test_a_resumed_run_may_change_its_schedule_and_announces_what_jumps(copied, drawn, caplog):
    caplog.set_level("INFO", "dig_jax")
    changes = {"optimizer__learning_rate": 1e-4, "optimizer__schedule": "cosine", "training__steps": 12}
    train.train(settings(**changes), copied)
    assert (
        "changed since the checkpoint: optimizer.learning_rate: 0.001 → 0.0001; optimizer.schedule:"
        " 'constant' → 'cosine'; training.steps: 6 → 12"
    ) in caplog.messages
    assert "the learning rate of the next step changes from 0.001 to 5e-05" in caplog.messages
    assert [record["step"] for record in records(copied)] == list(range(1, 13))


def test_a_resumed_run_with_more_steps_of_a_constant_schedule_announces_no_jump(copied, caplog):
    train.train(settings(training__steps=7), copied)
    assert "learning rate" not in caplog.text


def test_a_resumed_run_may_change_its_batch_size_and_goes_on_where_the_data_ended(copied):
    train.train(settings(training__steps=8, data__batch_size=16), copied)
    data = json.loads((copied / "checkpoints" / "8" / "data" / "metadata").read_text())
    assert data["examples"] == 6 * 8 + 2 * 16


def test_a_resumed_run_ramps_an_average_up_by_the_images_of_all_batch_sizes(tmp_path):
    """The half-life of step 3 is the number of images before it, 2 · 8."""
    half_life = {"training__ema_half_lives": (10**6,), "training__ema_rampup": 1.0}
    train.train(settings(training__steps=2, **half_life), tmp_path)
    train.train(settings(training__steps=3, data__batch_size=16, **half_life), tmp_path)
    before, after = (state_at(tmp_path, step) for step in (2, 3))
    jax.tree.map(
        lambda old, params, new: np.testing.assert_allclose(new, (old + params) / 2, rtol=1e-4, atol=1e-7),
        *(before["ema"]["half-life-1000000"], after["params"], after["ema"]["half-life-1000000"]),
    )


@pytest.mark.slow
def test_rematerialization_and_accumulation_may_change_and_compute_the_same_function(copied, tmp_path):
    other = shutil.copytree(copied, tmp_path / "other")
    train.train(settings(training__steps=8), copied)
    train.train(settings(training__steps=8, training__accumulation=1, model__remat="full"), other)
    ours, theirs = (jax.tree.leaves(state_at(path, 8)["params"]) for path in (copied, other))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_run_resumes_from_before_a_corrupt_checkpoint(trained, copied, caplog):
    newest = copied / "checkpoints" / "6"
    data = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(data, 100)
    train.train(settings(), copied)
    assert "falling back to 4" in caplog.text
    assert (copied / "checkpoints" / "6.unreadable").is_dir()
    assert_ended_alike(copied, trained, 6)


def test_a_workdir_with_only_corrupt_checkpoints_is_left_alone(copied):
    for sums in copied.glob("checkpoints/*/SHA256SUMS"):
        sums.unlink()
    with pytest.raises(CheckpointError, match="all checkpoints in .* are corrupt: 6, 4, 2"):
        train.train(settings(), copied)
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["2", "4", "6"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"seed": 1}, "seed: 0 → 1"),
        ({"model__hidden_size": 32}, "model.hidden_size: 16 → 32"),
        ({"data__options": {"image_size": 16}}, "data.options.image_size: 8 → 16"),
        ({"diffusion__schedule": "cosine"}, "diffusion.schedule: 'linear' → 'cosine'"),
        ({"optimizer__b2": 0.99}, "optimizer.b2: 0.999 → 0.99"),
        ({"training__label_dropout": 0.2, "training__steps": 9}, "training.label_dropout: 0.1 → 0.2"),
        ({"optimizer__clip_norm": 1.0}, "optimizer.clip_norm: 0.0 → 1.0"),
    ],
)
def test_a_workdir_with_different_settings_is_rejected_and_left_alone(copied, fields, named):
    path = copied / "config.json"
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"run was created with different settings: .*{named}"):
        train.train(settings(**fields), copied)
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(ConfigError, match=named):  # compared with the checkpoints' copy
        train.train(settings(**fields), copied)
    assert not path.exists()


def test_a_run_resumes_only_with_the_same_data(copied, monkeypatch):
    monkeypatch.setattr(FakeSource, "fingerprint", "0" * 16)
    monkeypatch.setattr(FakeSource, "class_names", tuple(f"wave {k}" for k in range(4)))
    message = (
        r"was trained on different data: fingerprint: '\w{16}' → '0{16}';"
        r" class_names: \['0', '1', '2', '3'\] → \['wave 0', 'wave 1', 'wave 2', 'wave 3'\]\. Use a new"
    )
    with pytest.raises(ConfigError, match=message):
        train.train(settings(), copied)


@pytest.mark.parametrize("number", [3, 5])
def test_added_and_removed_classes_are_named_before_the_state_is_restored(copied, number, monkeypatch):
    def open_source(path, name, split, options):
        return FakeSource(split=split, image_shape=(8, 8, 3), num_classes=number, length=100, seed=0)

    monkeypatch.setattr(components, "open_source", open_source)
    with pytest.raises(
        ConfigError, match=r"was trained on different data: .*class_names: \['0', '1', '2', '3'\] → "
    ):
        train.train(settings(), copied)


def test_a_collapsed_run_ends_and_keeps_the_checkpoints_from_before(copied):
    message = "training collapsed: .*; the last good checkpoint is .*/checkpoints/6. Run again with a lower"
    with pytest.raises(UserError, match=message):
        train.train(
            settings(training__steps=30, training__max_skipped_steps=5, optimizer__learning_rate=1e38), copied
        )
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["2", "4", "6"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state_at(copied, 6)["params"]))
    train.train(settings(training__steps=8), copied)
    assert state_at(copied, 8)["skipped_steps"] == 0


def test_settings_may_change_before_the_first_checkpoint(tmp_path):
    for seed in (0, 5):
        with claim_workdir(settings(seed=seed), tmp_path):
            pass
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 5


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\0\udcff"])
def test_an_unreadable_config_json_is_reported_and_left_alone(copied, text):
    path = copied / "config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        ConfigError, match=rf"cannot read {path}: .*; delete it \(checkpoints contain a copy\)"
    ):
        train.train(settings(), copied)
    assert path.read_bytes() == text.encode(errors="surrogateescape")


def test_fields_missing_in_an_older_config_json_take_their_defaults(copied):
    path = copied / "config.json"
    described = json.loads(path.read_text())
    del described["config"]["logging"]["wandb"]
    path.write_text(json.dumps(described))
    train.train(settings(), copied)
    assert config.from_dict(json.loads(path.read_text())["config"]) == settings()
    described["config"]["seed"] = 1
    path.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="was created with different settings: seed: 1 → 0. "):
        train.train(settings(), copied)


def test_a_removed_field_in_config_json_is_named(copied):
    path = copied / "config.json"
    described = json.loads(path.read_text())
    described["config"]["model"]["experts"] = 8
    path.write_text(json.dumps(described))
    before = path.read_bytes()
    with pytest.raises(
        ConfigError, match=f"{path} was written by a different version .*unknown field config.model.experts"
    ):
        train.train(settings(), copied)
    assert path.read_bytes() == before


def test_a_workdir_that_is_not_writable_raises_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"invalid directory {workdir}: it is a file or in a file"):
            train.train(settings(), workdir)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_terminated_or_interrupted_run_saves_and_resumes_bit_identically(
    trained, tmp_path, number, monkeypatch
):
    before = signal.getsignal(number)
    to_global, numbers = loop.to_global, iter(range(1, 99))

    def interrupted(batch, mesh):
        if next(numbers) == 4:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process
        return to_global(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "to_global", interrupted)
        assert train.train(settings(checkpoint__every_steps=100), tmp_path) is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert signal.getsignal(number) is before
    train.train(settings(), tmp_path)
    assert_ended_alike(tmp_path, trained, 6)


def test_the_start_says_what_is_trained_on(tmp_path, drawn, caplog):
    caplog.set_level("INFO", "dig_jax")
    train.train(settings(training__steps=1), tmp_path)
    assert any("images of 4 classes (0, 1, 2, 3), " in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("labels", "seeds", "message"),
    [
        ([4], None, "label out of range: got 4; expected 0 … 3"),
        ([0, 1], [1, 2, 3], "numbers of labels and seeds differ: got 2 and 3"),
        (None, [2**31], "seed out of range: got 2147483648; expected 0 … 2147483647"),
    ],
)
def test_invalid_labels_and_seeds_are_rejected(trained, labels, seeds, message):
    with pytest.raises(ConfigError, match=message):
        sample(settings(), trained, lambda class_names: labels, seeds and np.array(seeds))
    assert not (trained / "generated.npz").exists()


def test_init_from_starts_with_another_runs_average(trained, tmp_path, drawn):
    train.train(settings(init_from=str(trained), training__steps=0, mesh__data=1), tmp_path)
    average = state_at(trained, 6)["ema"]["0.9"]
    params = jax.tree.map(np.asarray, drawn[-1].params)
    assert drawn[-1].step == 0
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(params), jax.tree.leaves(average))
    train.train(settings(init_from=str(trained), training__steps=2), tmp_path)
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_init_from_an_exported_file_equals_init_from_its_workdir(trained, tmp_path, drawn):
    export(settings(), trained, tmp_path / "x.safetensors")
    for source in (trained, tmp_path / "x.safetensors"):
        train.train(settings(init_from=str(source), training__steps=0), tmp_path / source.stem)
    ours, theirs = (sampler.params for sampler in drawn[-2:])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    with pytest.raises(ConfigError, match="config.init_from: nowhere.safetensors: .*no such file"):
        train.train(settings(init_from="nowhere.safetensors"), tmp_path / "nowhere")


def test_init_from_a_missing_or_different_model_is_rejected(trained, tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=f"config.init_from: no checkpoint in {missing}"):
        train.train(settings(init_from=str(missing)), tmp_path / "run")
    with pytest.raises(ConfigError, match="different settings, .*: model.hidden_size: 16 → 32"):
        train.train(settings(init_from=str(trained), model__hidden_size=32), tmp_path / "run")


@pytest.mark.parametrize(("heldout", "reported"), [(9, [2, 4, 5]), (0, [])])
def test_the_heldout_split_may_have_any_size(tmp_path, drawn, heldout, reported, monkeypatch):
    def open_source(path, name, split, options):
        length = heldout if split == "heldout" else 100
        return FakeSource(split=split, image_shape=(8, 8, 3), num_classes=4, length=length, seed=0)

    monkeypatch.setattr(components, "open_source", open_source)
    fields = {"training__steps": 5, "logging__heldout_every_steps": 2, "logging__every_steps": 100}
    train.train(settings(checkpoint__every_steps=100, **fields), tmp_path)
    steps = [record["step"] for record in records(tmp_path) if record.get("heldout_loss", 0) > 0]
    assert steps == reported


def test_a_step_with_nan_is_skipped_reported_and_not_saved(tmp_path, drawn, caplog, monkeypatch):
    to_global, numbers = loop.to_global, iter(range(1, 99))

    def poisoned(batch, mesh):
        if next(numbers) == 2:
            batch = batch | {"image": np.full_like(batch["image"], np.nan)}
        return to_global(batch, mesh)

    monkeypatch.setattr(loop, "to_global", poisoned)
    train.train(settings(checkpoint__every_steps=1, training__steps=3), tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "3"}
    before, end = (state_at(tmp_path, step) for step in (1, 3))
    assert [state["skipped_steps"] for state in (before, end)] == [0, 1]
    assert (end["step"], end["opt_state"][0]["count"]) == (3, 2)
    assert [(record["skipped_steps"], record["loss"] is None) for record in records(tmp_path)] == [
        (0, False),
        (1, True),
        (0, False),
    ]
    assert "skipped 1 of the last 1 steps: loss, gradient or update was not finite" in caplog.text


def test_a_run_describes_itself(trained):
    described = json.loads((trained / "config.json").read_text())
    assert config.from_dict(described["config"]) == settings()
    assert described["versions"]["jax"] == jax.__version__
    table = (trained / "parameters.txt").read_text()
    total = sum(leaf.size for leaf in jax.tree.leaves(state_at(trained, 6)["params"]))
    assert "blocks/groups/0/mixer/qkv_proj/kernel" in table
    assert f"Total: {total:,} -- {4 * total:,} bytes" in table
