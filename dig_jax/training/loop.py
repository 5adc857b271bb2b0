"""Training from a config to a workdir: mesh, data, state, restore, loop, report."""

import contextlib
import dataclasses
import functools
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dig_jax import config, report
from dig_jax.checkpoint import Checkpoints, described, has_checkpoints, read_config, read_params
from dig_jax.config import Config
from dig_jax.data import batches, epoch
from dig_jax.diffusion import get_sampler
from dig_jax.errors import ConfigError, UserError, blaming
from dig_jax.experiment import Experiment, Params, param_count
from dig_jax.parallel import (
    check_agreement,
    make_mesh,
    process_share,
    replicated,
    state_sharding,
    to_global,
)
from dig_jax.sampling import Sampler
from dig_jax.training import step as steps
from dig_jax.training.lowering import abstract_batch, abstract_state, fresh_state, lower_train_step
from dig_jax.training.metrics import MetricWriter, Progress, StepMeter, duration
from dig_jax.training.preemption import notice_of_end

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same from the first step to the last.

    What is not a checkpoint is written to `output`: the workdir, or in processes but the first one a
    directory that is thrown away.
    """

    experiment: Experiment
    mesh: Mesh
    workdir: Path
    output: Path

    @property
    def settings(self) -> Config:
        return self.experiment.config

    @property
    def share(self) -> dict[str, int]:
        """Which part of every batch is this process's."""
        share = process_share(self.mesh)
        return {"process_index": share.index, "process_count": share.count}


def train(settings: Config, workdir: Path) -> dict[str, Any] | None:
    """Trains, or goes on training, until `settings.training.steps`, then draws and scores samples.

    At SIGTERM, or a cloud's notice of preemption, it finishes the step, saves and returns.

    Returns:
        The scores, as in scores.json; None if it was told to end before the last step.

    Raises:
        UserError: settings that cannot be, a workdir that began with others, damaged checkpoints.
    """
    began = time.monotonic()
    check_agreement({"workdir": workdir.absolute(), **config.flattened(described(settings))})
    mesh = make_mesh(settings.mesh, settings.data.batch_size, settings.training.accumulation)
    experiment = Experiment(settings)
    _check(experiment)
    abstract = abstract_state(experiment, mesh)
    _check_fits(experiment, mesh, abstract["params"])
    claim_workdir(settings, workdir)
    # Kernels cannot be partitioned: knowing the mesh, each runs on its device's part of the batch.
    with jax.set_mesh(mesh), _output(workdir) as output:
        run = _Run(experiment, mesh, workdir, output)
        with contextlib.closing(Checkpoints(workdir, settings.checkpoint)) as checkpoints:
            state, examples = _start(run, abstract, checkpoints)
            _introduce(run, state)
            if int(state["step"]) < settings.training.steps:
                state = _loop(run, state, examples, checkpoints)
            checkpoints.wait()
        step = int(state["step"])
        if step < settings.training.steps:
            log.info("told to end at step %d of %d, which is saved", step, settings.training.steps)
            return None
        sampler = _sampler(run, state)
        report.draw_samples(sampler, output)
        scores = report.score(sampler, output)
        if scores:
            report.draw_neighbours(sampler, output)
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
        if jax.process_index() == 0:
            report.write_json(workdir / "config.json", described(settings))
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written to: {error.strerror}") from error


@contextlib.contextmanager
def _output(workdir: Path) -> Iterator[Path]:
    if jax.process_index() == 0:
        yield workdir
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


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


def _check_fits(experiment: Experiment, mesh: Mesh, params: Params) -> None:
    """Raises unless the mesh divides the model's heads and rows.

    Raises:
        ConfigError: names what is not divided, and by what.
    """
    batch = abstract_batch(experiment, mesh)
    with jax.set_mesh(mesh), blaming("config.mesh"):
        jax.eval_shape(experiment.denoise, params, batch["image"], batch["label"], batch["label"])


def _start(run: _Run, abstract: steps.State, checkpoints: Checkpoints) -> tuple[steps.State, int]:
    """The state to go on from and the examples consumed so far: resumed, else warm, else from scratch."""
    restored = checkpoints.restore(abstract)
    if restored is not None:
        state, data = restored
        expected = _data_item(run, data["examples"])
        if data != expected:
            raise ConfigError(f"{run.workdir} was trained on other data: {data}, now {expected}")
        return state, data["examples"]
    layout, params = state_sharding(abstract, run.mesh), None
    if run.settings.init_from:
        params = jax.device_put(_warm_params(run, abstract["params"]), layout["params"])
    return jax.jit(functools.partial(fresh_state, run.experiment), out_shardings=layout)(params), 0


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
    (run.output / "parameters.txt").write_text(table + "\n")
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

    clock, longest = time.monotonic, settings.checkpoint.every_minutes * 60

    def due(every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == last)

    with (
        contextlib.closing(_batches(run, examples)) as data,
        contextlib.closing(_writer(run, first)) as writer,
        contextlib.closing(Progress(first_step=first, steps=last)) as progress,
        notice_of_end() as is_last,
    ):
        meter = StepMeter(settings.data.batch_size)

        def write_record(step: int, heldout: jax.Array | None) -> None:
            record = meter.take() | ({} if heldout is None else {"heldout_loss": float(heldout)})
            writer.write(step, record)
            progress.show(step, record)

        pending, saved = None, clock()
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
            ending = is_last(step)
            saving = ending or due(settings.checkpoint.every_steps, step)
            if longest and not saving and due(settings.logging.every_steps, step):
                saving = _agreed(clock() - saved > longest)
            recording = saving or heldout is not None or due(settings.logging.every_steps, step)
            pending = (step, heldout) if recording else None
            if saving:
                # The record comes first, so that a run which goes on from here does not lack it.
                write_record(step, heldout)
                pending = None
                consumed = examples + (step - first) * settings.data.batch_size
                loss = None if heldout is None else float(heldout)
                checkpoints.save(step, state, _data_item(run, consumed), settings, heldout_loss=loss)
                saved = clock()
            if ending:
                break
            if due(settings.sampling.every_steps, step) and step != last:
                with meter.paused():
                    report.draw_samples(_sampler(run, state), run.output)
    return state


def _agreed(flag: bool) -> bool:
    """The first process's answer, in all of them: their clocks differ."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(flag))) if jax.process_count() > 1 else flag


def _batches(run: _Run, start: int) -> grain.DatasetIterator:
    data = run.settings.data
    return batches(
        run.experiment.train_source,
        batch_size=data.batch_size,
        seed=run.settings.seed,
        start=start,
        flip=data.flip,
        **run.share,
    )


def _writer(run: _Run, first_step: int) -> MetricWriter:
    return MetricWriter(run.output, first_step=first_step, tensorboard=run.settings.logging.tensorboard)


def _compiled_step(
    run: _Run, state: steps.State
) -> Callable[[steps.State, steps.Batch], tuple[steps.State, steps.Metrics]]:
    """The train step, which takes over its state's memory; compiled ahead, to be timed apart."""
    began = time.monotonic()
    compiled = lower_train_step(run.experiment, run.mesh, state).compile()
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
        for number, batch in enumerate(epoch(source, batch_size=size, **run.share)):
            jax.block_until_ready(sums[-1:])
            sums.append(batch_loss(params, to_global(batch, run.mesh), number * size))
        total, count = map(sum, zip(*sums, strict=True))
        return total / count

    return mean
