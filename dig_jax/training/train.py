"""Training from a config to a workdir: mesh, data, state, restore, loop, report."""

import contextlib
import dataclasses
import functools
import logging
import reprlib
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

from dig_jax import config
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.checkpoints.reader import read_model
from dig_jax.components import Components, Params, param_count
from dig_jax.config import Config
from dig_jax.data import batches
from dig_jax.data.latents import LatentSource, check_latents
from dig_jax.diffusion import make_sampler
from dig_jax.errors import ConfigError, naming_setting
from dig_jax.evaluation.evaluate import draw_neighbors, score
from dig_jax.parallel import (
    check_agreement,
    make_mesh,
    on_process_0,
    process_shard,
    state_sharding,
    to_global,
)
from dig_jax.progress import Progress, duration
from dig_jax.reporting.html import write_report
from dig_jax.reporting.sample_grids import draw_samples
from dig_jax.runtime import cache_hits
from dig_jax.sampling.sampler import Sampler
from dig_jax.training.compile import abstract_batch, lower_train_step
from dig_jax.training.heldout import HeldoutLoss
from dig_jax.training.objectives.denoising import Batch, Metrics
from dig_jax.training.preemption import notice_of_end
from dig_jax.training.state import State, abstract_state, fresh_state
from dig_jax.training.telemetry.profiler import ProfiledSteps, Profiler
from dig_jax.training.telemetry.starts import note_start
from dig_jax.training.telemetry.utilization import peak_memory, peak_of
from dig_jax.training.telemetry.wandb import WandbRun, require_wandb
from dig_jax.training.telemetry.writer import MetricWriter, StepMeter, details
from dig_jax.training.workdir import claim_workdir

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same from the first step to the last.

    What is not a checkpoint is written to `output`: the workdir, or in processes but the first one a
    directory that is thrown away.
    """

    components: Components
    mesh: Mesh
    workdir: Path
    output: Path
    profile: ProfiledSteps | None

    @property
    def settings(self) -> Config:
        return self.components.config

    @property
    def share(self) -> dict[str, int]:
        """Which part of every batch is this process's."""
        share = process_shard(self.mesh)
        return {"process_index": share.index, "process_count": share.count}


def train(settings: Config, workdir: Path, profile: ProfiledSteps | None = None) -> dict[str, Any] | None:
    """Trains, or goes on training, until `settings.training.steps`, then draws and scores samples.

    At SIGTERM, or a cloud's notice of preemption, it finishes the step, saves and returns.

    Args:
        settings: of the run; a workdir goes on only with those it began with.
        workdir: where the run lives.
        profile: steps to be traced into WORKDIR/profile.

    Returns:
        The scores, as in scores.json; None if it was told to end before the last step.

    Raises:
        UserError: settings that cannot be, a workdir that began with others, damaged checkpoints.
    """
    began = time.monotonic()
    check_agreement({"workdir": workdir.absolute(), **config.flattened(config_and_versions(settings))})
    mesh = make_mesh(settings.mesh, settings.data.batch_size, settings.training.accumulation)
    components = Components(settings)
    _check(components)
    check_agreement({"data": components.train_source.fingerprint})
    abstract = abstract_state(components, mesh)
    _check_fits(components, mesh, abstract["params"])
    claim_workdir(settings, workdir)
    # Kernels cannot be partitioned: knowing the mesh, each runs on its device's part of the batch.
    with jax.set_mesh(mesh), _output(workdir) as output:
        run = _Run(components, mesh, workdir, output, profile)
        with Checkpoints(workdir, settings.checkpoint) as checkpoints:
            state, examples = _start(run, abstract, checkpoints)
            step = int(state["step"])
            _introduce(run, state)
            with contextlib.closing(_writer(run, step)) as writer:
                if step < settings.training.steps:
                    state = _loop(run, state, examples, checkpoints, writer)
                    step = int(state["step"])
                checkpoints.wait()
                if step < settings.training.steps:
                    log.info("told to end at step %d of %d, which is saved", step, settings.training.steps)
                    return None
                scores = _show(run, state, writer)
    log.info("everything is in %s, after %s", workdir, duration(time.monotonic() - began))
    return scores


@contextlib.contextmanager
def _output(workdir: Path) -> Iterator[Path]:
    if jax.process_index() == 0:
        yield workdir
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def _check(components: Components) -> None:
    """Raises for what would otherwise come up in mid-run.

    Raises:
        ConfigError: names the setting.
    """
    require_wandb(components.config.logging.wandb)
    settings, channels = components.config.sampling, components.image_spec.image_shape[2]
    diffusion, _, source = components.diffusion, components.heldout_source, components.train_source
    if isinstance(source, LatentSource):
        # It is needed for samples anyway, and loaded here so that they do not fail in mid-run.
        decoder = components.autoencoder
        check_latents(source, components.config, decoder.fingerprint() if decoder else None)
    with naming_setting("config.sampling"):
        make_sampler(settings.sampler, steps=settings.steps, clip=settings.clip).check(diffusion)
        if settings.guidance_channels is not None and settings.guidance_channels > channels:
            raise ValueError(f"guidance_channels={settings.guidance_channels}, but images have {channels}")


def _check_fits(components: Components, mesh: Mesh, params: Params) -> None:
    """Raises unless the mesh divides the model's heads and rows.

    Raises:
        ConfigError: names what is not divided, and by what.
    """
    batch = abstract_batch(components, mesh)
    with jax.set_mesh(mesh), naming_setting("config.mesh"):
        jax.eval_shape(components.denoise, params, batch["image"], batch["label"], batch["label"])


def _start(run: _Run, abstract: State, checkpoints: Checkpoints) -> tuple[State, int]:
    """The state to go on from and the examples consumed so far: resumed, else warm, else from scratch."""
    restored = checkpoints.restore(abstract)
    if restored is not None:
        state, data = restored
        expected = _data_item(run, data["examples"])
        changed = [
            f"{name}: {reprlib.repr(value)} → {reprlib.repr(expected.get(name))}"
            for name, value in data.items()
            if value != expected.get(name)
        ]
        if changed:
            raise ConfigError(f"{run.workdir} was trained on other data ({'; '.join(changed)})")
        return state, data["examples"]
    layout, params = state_sharding(abstract, run.mesh), None
    if run.settings.init_from is not None:
        params = _warm_params(run, abstract["params"])
    return jax.jit(functools.partial(fresh_state, run.components), out_shardings=layout)(params), 0


def _warm_params(run: _Run, expected: Params) -> Params:
    """The parameters that `init_from` names, if they fit, laid out as they are expected."""
    path = run.settings.init_from
    with naming_setting("config.init_from"):
        _, step, params = read_model(Path(path))

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
    return jax.tree.map(
        lambda x, target: jax.make_array_from_callback(x.shape, target.sharding, np.asarray(x).__getitem__),
        params,
        expected,
    )


def _data_item(run: _Run, examples: int) -> dict[str, Any]:
    source = run.components.train_source
    return {
        "seed": run.settings.seed,
        "fingerprint": source.fingerprint,
        "examples": examples,
        **run.components.image_spec.to_dict(),
    }


def _introduce(run: _Run, state: State) -> None:
    """Says what is about to be trained; the parameters' table goes to parameters.txt."""
    table = parameter_overview.get_parameter_overview(state["params"], include_stats=False)
    (run.output / "parameters.txt").write_text(table + "\n")
    step = int(state["step"])
    note_start(run.output, step)
    log.info(
        "%s, %.2f M parameters, on %d × %s; %s %s",
        run.settings.model.name,
        param_count(state["params"]) / 1e6,
        run.mesh.size,
        run.mesh.devices.flat[0].device_kind,
        f"step {step} of {run.settings.training.steps} is done in" if step else "workdir",
        run.workdir,
    )


def _sampling_params(run: _Run, state: State) -> Params:
    name = run.settings.sampled_ema
    return state["params"] if name == "params" else state["ema"][name]


def _sampler(run: _Run, state: State) -> Sampler:
    return Sampler(run.components, _sampling_params(run, state), step=int(state["step"]), mesh=run.mesh)


def _show(run: _Run, state: State, writer: MetricWriter) -> dict[str, Any]:
    """Draws and scores what has been learnt; returns the scores."""
    sampler = _sampler(run, state)
    _draw(run, sampler, writer)
    scores = score(sampler, run.output)
    draw_neighbors(sampler, run.output)
    _write_report(run)
    return scores


def _draw(run: _Run, sampler: Sampler, writer: MetricWriter) -> None:
    draw_samples(sampler, run.output)
    writer.picture(sampler.step, run.output / "samples.png")


def _write_report(run: _Run) -> None:
    if jax.process_index() == 0:
        try:
            write_report(run.output)
        except Exception as error:  # whatever it is, a page to look at is not worth the run
            log.warning("report.html cannot be written: %s: %s", type(error).__name__, error)


def _loop(run: _Run, state: State, examples: int, checkpoints: Checkpoints, writer: MetricWriter) -> State:
    """Steps, and what is due between them.

    While a step runs, the next batch is on its way to the devices and the next step is dispatched; a step is
    read only then. Nothing else waits for the devices, except what is due now and then, and that is not
    counted as training.
    """
    settings = run.settings
    first, last = int(state["step"]), settings.training.steps
    train_step = _compiled_step(run, state)
    peak = peak_of(run.components, run.mesh, train_step)
    heldout_loss = HeldoutLoss(run.components, run.mesh)

    clock, longest = time.monotonic, settings.checkpoint.every_minutes

    def due(every: int | None, step: int) -> bool:
        return every is not None and (step % every == 0 or step == last)

    with (
        contextlib.closing(_batches(run, examples)) as data,
        contextlib.closing(Progress("step", first=first, total=last)) as progress,
        contextlib.closing(Profiler(run.output / "profile", run.profile, first, last)) as profiler,
        notice_of_end() as is_last,
    ):
        meter = StepMeter(settings.data.batch_size)

        def next_batch() -> Batch:
            with meter.waiting_for_data():
                batch = next(data)
            return to_global(batch, run.mesh)

        def write_record(step: int, heldout: float | None) -> None:
            record = meter.take()
            record |= peak.shares(record["images_per_second"]) | peak_memory(run.mesh.local_devices)
            record |= {} if heldout is None else {"heldout_loss": heldout}
            writer.write(step, record)
            progress.show(step, details(record))

        pending, saved, batch = None, clock(), next_batch()
        for step in range(first + 1, last + 1):
            if profiler.starts(step):
                with meter.paused():
                    profiler.start()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, batch)
            batch = next_batch() if step < last else None
            if pending:
                write_record(*pending)
            meter.add(step, metrics)
            if profiler.stops(step):
                with meter.paused():
                    profiler.stop()
            heldout = None
            if due(settings.logging.heldout_every_steps, step):
                with meter.paused():
                    heldout = heldout_loss(_sampling_params(run, state))
            ending = is_last(step)
            saving = ending or due(settings.checkpoint.every_steps, step)
            if longest is not None and not saving and due(settings.logging.every_steps, step):
                saving = _agreed(clock() - saved > 60 * longest)
            drawing = due(settings.sampling.every_steps, step) and step != last and not ending
            recording = saving or heldout is not None or due(settings.logging.every_steps, step)
            pending = (step, heldout) if recording else None
            if saving:
                # The record comes first, so that a run which goes on from here does not lack it.
                write_record(step, heldout)
                pending = None
            with meter.paused() if saving or drawing else contextlib.nullcontext():
                if saving:
                    consumed = examples + (step - first) * settings.data.batch_size
                    item = _data_item(run, consumed)
                    checkpoints.save(step, state, item, settings, heldout_loss=heldout)
                    saved = clock()
                if drawing:
                    _draw(run, _sampler(run, state), writer)
                if saving or drawing:
                    _write_report(run)
            if ending:
                break
    return state


def _agreed(flag: bool) -> bool:
    """The first process's answer, in all of them: their clocks differ."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(flag))) if jax.process_count() > 1 else flag


def _batches(run: _Run, start: int) -> grain.DatasetIterator:
    data = run.settings.data
    return batches(
        run.components.train_source,
        batch_size=data.batch_size,
        seed=run.settings.seed,
        start=start,
        flip=data.flip,
        **run.share,
    )


def _writer(run: _Run, first_step: int) -> MetricWriter:
    project, wandb = run.settings.logging.wandb, []
    if project is not None:
        # The first process's, whose errors are those of all.
        fields = config.to_dict(run.settings)
        on_process_0(lambda: wandb.append(WandbRun(run.output, project=project, settings=fields)))
    return MetricWriter(
        run.output,
        first_step=first_step,
        tensorboard=run.settings.logging.tensorboard,
        wandb=wandb[0] if wandb else None,
    )


def _compiled_step(run: _Run, state: State) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The train step, which takes over its state's memory; compiled ahead, to be timed apart."""
    began = time.monotonic()
    with cache_hits() as hits:
        compiled = lower_train_step(run.components, run.mesh, state).compile()
    how = "loaded, as an earlier start compiled it" if hits else "compiled"
    log.info("the train step is %s, in %s", how, duration(time.monotonic() - began))
    return compiled
