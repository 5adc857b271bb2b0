"""Training from a config to a workdir: mesh, data, state, restore, loop, report."""

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax
from clu import parameter_overview
from jax.sharding import Mesh

from dig_jax import config, report
from dig_jax.checkpoint import Checkpoints, described, has_checkpoints, read_config, read_params
from dig_jax.config import Config
from dig_jax.data import batches, epoch
from dig_jax.diffusion import get_sampler
from dig_jax.errors import ConfigError, UserError, blaming
from dig_jax.experiment import Experiment, Params, param_count
from dig_jax.parallel import batch_sharding, make_mesh, replicated, to_global
from dig_jax.sampling import Sampler
from dig_jax.training import step as steps
from dig_jax.training.metrics import MetricWriter, Progress, StepMeter, duration
from dig_jax.training.optimizer import make_optimizer, make_schedule

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same from the first step to the last."""

    experiment: Experiment
    mesh: Mesh
    workdir: Path

    @property
    def settings(self) -> Config:
        return self.experiment.config

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.settings.optimizer, self.settings.training.steps)

    @property
    def processes(self) -> dict[str, int]:
        return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def train(settings: Config, workdir: Path) -> dict[str, Any]:
    """Trains, or goes on training, until `settings.training.steps`, then draws and scores samples.

    Returns:
        The scores, as in scores.json.

    Raises:
        UserError: settings that cannot be, a workdir that began with others, damaged checkpoints.
    """
    began = time.monotonic()
    mesh = make_mesh(settings.mesh, settings.data.batch_size, settings.training.accumulation)
    run = _Run(Experiment(settings), mesh, workdir)
    _check(run.experiment)
    abstract_state = _abstract_state(run)
    claim_workdir(settings, workdir)
    # Kernels cannot be partitioned: knowing the mesh, each runs on its device's part of the batch.
    with jax.set_mesh(mesh):
        with contextlib.closing(Checkpoints(workdir, settings.checkpoint)) as checkpoints:
            state, examples = _start(run, abstract_state, checkpoints)
            _introduce(run, state)
            if int(state["step"]) < settings.training.steps:
                state = _loop(run, state, examples, checkpoints)
            checkpoints.wait()
        sampler = _sampler(run, state)
        report.draw_samples(sampler, workdir)
        scores = report.score(sampler, workdir)
        if scores:
            report.draw_neighbours(sampler, workdir)
            log.info(report.summary(scores))
    log.info("everything is in %s, after %s", workdir, duration(time.monotonic() - began))
    return scores


def claim_workdir(settings: Config, workdir: Path) -> None:
    """Makes the workdir and writes config.json into it, unless it began with other settings.

    Raises:
        UserError: it did, and there are checkpoints; or the settings that it began with cannot be read; or it
            cannot be written to.
    """
    if has_checkpoints(workdir):
        config.check_same(_began_with(workdir), settings, workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        report.write_json(workdir / "config.json", described(settings))
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written to: {error.strerror}") from error


def _began_with(workdir: Path) -> Config:
    path = workdir / "config.json"
    if not path.exists():
        return read_config(workdir)
    try:
        return config.from_dict(json.loads(path.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; delete it, checkpoints hold a copy") from error


def _check(experiment: Experiment) -> None:
    """Raises for what would otherwise come up in mid-run.

    Raises:
        ConfigError: names the setting.
    """
    settings, channels = experiment.config.sampling, experiment.train_source.image_shape[2]
    diffusion, _ = experiment.diffusion, experiment.heldout_source
    with blaming("config.sampling"):
        get_sampler(settings.sampler)
        diffusion.respaced(settings.steps)
        if settings.guidance_channels > channels:
            raise ValueError(f"guidance_channels={settings.guidance_channels}, but images have {channels}")


def _fresh_state(run: _Run) -> steps.State:
    return steps.init_state(run.experiment, run.optimizer, steps.init_params(run.experiment))


def _abstract_state(run: _Run) -> steps.State:
    """Shapes, dtypes and layout of the state; building it checks the model's settings."""
    sharding = replicated(run.mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(lambda: _fresh_state(run)),
    )


def _start(run: _Run, abstract_state: steps.State, checkpoints: Checkpoints) -> tuple[steps.State, int]:
    """The state to go on from and the examples consumed so far: resumed, else warm, else from scratch."""
    restored = checkpoints.restore(abstract_state)
    if restored is not None:
        state, data = restored
        expected = _data_item(run, data["examples"])
        if data != expected:
            raise ConfigError(f"{run.workdir} was trained on other data: {data}, now {expected}")
        return state, data["examples"]
    whole = replicated(run.mesh)
    if run.settings.init_from:
        params = jax.device_put(_warm_params(run, abstract_state["params"]), whole)
        make = functools.partial(steps.init_state, run.experiment, run.optimizer)
        return jax.jit(make, out_shardings=whole)(params), 0
    return jax.jit(functools.partial(_fresh_state, run), out_shardings=whole)(), 0


def _warm_params(run: _Run, expected: Params) -> Params:
    """The parameters that `init_from` names, if they fit."""
    path = run.settings.init_from
    with blaming("config.init_from"):
        _, step, params = read_params(Path(path))

    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(key): x.shape for key, x in jax.tree.leaves_with_path(tree)}

    ours, theirs = shapes(expected), shapes(params)
    wrong = [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]
    if wrong:
        raise ConfigError(
            f"config.init_from={path}: {len(wrong)} parameters do not fit this model, the first is"
            f" {wrong[0]}: {theirs.get(wrong[0])} there, {ours.get(wrong[0])} here"
        )
    log.info("starting from the parameters of %s, step %d", path, step)
    return params


def _data_item(run: _Run, examples: int) -> dict[str, Any]:
    fingerprint = run.experiment.train_source.fingerprint
    return {"seed": run.settings.seed, "fingerprint": fingerprint, "examples": examples}


def _introduce(run: _Run, state: steps.State) -> None:
    """Says what is about to be trained; the parameters' table goes to parameters.txt."""
    table = parameter_overview.get_parameter_overview(state["params"], include_stats=False)
    (run.workdir / "parameters.txt").write_text(table + "\n")
    step = int(state["step"])
    log.info(
        "%s, %.2f M parameters, on %d × %s; %s %s",
        run.settings.model.name,
        param_count(state["params"]) / 1e6,
        run.mesh.size,
        run.mesh.devices.flat[0].device_kind,
        f"step {step} of {run.settings.training.steps} is done in" if step else "workdir",
        run.workdir,
    )


def _sampling_params(run: _Run, state: steps.State) -> Params:
    name = run.settings.sampled_ema
    return state["params"] if name == "params" else state["ema"][name]


def _sampler(run: _Run, state: steps.State) -> Sampler:
    return Sampler(run.experiment, _sampling_params(run, state), step=int(state["step"]), mesh=run.mesh)


def _loop(run: _Run, state: steps.State, examples: int, checkpoints: Checkpoints) -> steps.State:
    """Steps, and what is due between them; a step is read only when the next one is under way."""
    settings = run.settings
    first, last = int(state["step"]), settings.training.steps
    train_step = _compiled_step(run, state)
    heldout_loss = _heldout_loss(run)

    def due(every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == last)

    with (
        contextlib.closing(_batches(run, examples)) as data,
        contextlib.closing(_writer(run, first)) as writer,
        contextlib.closing(Progress(first_step=first, steps=last)) as progress,
    ):
        meter = StepMeter(settings.data.batch_size)

        def write_record(step: int, heldout: jax.Array | None) -> None:
            record = meter.take() | ({} if heldout is None else {"heldout_loss": float(heldout)})
            writer.write(step, record)
            progress.show(step, record)

        pending = None
        for step in range(first + 1, last + 1):
            with meter.waiting_for_data():
                batch = next(data)
            state, metrics = train_step(state, to_global(batch, run.mesh))
            if pending:
                write_record(*pending)
            meter.add(metrics)
            heldout = None
            if due(settings.logging.heldout_every_steps, step):
                with meter.paused():
                    heldout = heldout_loss(_sampling_params(run, state))
            saving = due(settings.checkpoint.every_steps, step)
            recording = saving or heldout is not None or due(settings.logging.every_steps, step)
            pending = (step, heldout) if recording else None
            if saving:
                # The record comes first, so that a run which goes on from here does not lack it.
                write_record(step, heldout)
                pending = None
                consumed = examples + (step - first) * settings.data.batch_size
                checkpoints.save(step, state, _data_item(run, consumed), settings)
            if due(settings.sampling.every_steps, step) and step != last:
                with meter.paused():
                    report.draw_samples(_sampler(run, state), run.workdir)
    return state


def _batches(run: _Run, start: int) -> grain.DatasetIterator:
    data = run.settings.data
    return batches(
        run.experiment.train_source,
        batch_size=data.batch_size,
        seed=run.settings.seed,
        start=start,
        flip=data.flip,
        **run.processes,
    )


def _writer(run: _Run, first_step: int) -> MetricWriter:
    return MetricWriter(run.workdir, first_step=first_step, tensorboard=run.settings.logging.tensorboard)


def _compiled_step(
    run: _Run, state: steps.State
) -> Callable[[steps.State, steps.Batch], tuple[steps.State, steps.Metrics]]:
    """The train step, which takes over its state's memory; compiled ahead, to be timed apart."""
    began = time.monotonic()
    size, split = run.settings.data.batch_size, batch_sharding(run.mesh)
    image_shape = (size, *run.experiment.train_source.image_shape)
    batch = {
        "image": jax.ShapeDtypeStruct(image_shape, jnp.float32, sharding=split),
        "label": jax.ShapeDtypeStruct((size,), jnp.int32, sharding=split),
    }
    schedule = make_schedule(run.settings.optimizer, run.settings.training.steps)
    train_step = jax.jit(
        functools.partial(steps.train_step, run.experiment, run.optimizer, schedule),
        donate_argnums=0,
        out_shardings=replicated(run.mesh),
    )
    compiled = train_step.lower(state, batch).compile()
    log.info("the train step is compiled, in %s", duration(time.monotonic() - began))
    return compiled


def _heldout_loss(run: _Run) -> Callable[[Params], jax.Array | None]:
    """A function of the parameters: their mean loss on the held-out images; None where there are none."""
    source, size = run.experiment.heldout_source, run.settings.data.batch_size
    batch_loss = jax.jit(
        functools.partial(steps.heldout_loss, run.experiment), out_shardings=replicated(run.mesh)
    )

    def mean(params: Params) -> jax.Array | None:
        if not len(source):
            return None
        sums = []
        for number, batch in enumerate(epoch(source, batch_size=size, **run.processes)):
            jax.block_until_ready(sums[-1:])
            sums.append(batch_loss(params, to_global(batch, run.mesh), number * size))
        total, count = map(sum, zip(*sums, strict=True))
        return total / count

    return mean
