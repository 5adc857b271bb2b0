"""The train command: validate the settings, build the run, train, and score the result."""

import contextlib
import logging
import pathlib
import time
from typing import Any

import jax
from clu import parameter_overview
from jax.sharding import Mesh

from dig_jax import config
from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.frozen_model import read_frozen_model
from dig_jax.checkpoints.manager import Checkpoints
from dig_jax.components import Components, Features, Params, param_count
from dig_jax.config import Config
from dig_jax.data.image_folder import folder
from dig_jax.data.latents import LatentSource, check_latents
from dig_jax.data.summary import summary
from dig_jax.errors import ConfigError, alternatives, naming_setting
from dig_jax.evaluation.evaluate import draw_neighbors
from dig_jax.evaluation.registry import check_keep_best, evaluators_for
from dig_jax.files.atomic import replacing
from dig_jax.files.paths import Path, absolute, is_remote
from dig_jax.parallel import check_agreement, make_mesh, on_process_0, output_folder
from dig_jax.progress import duration
from dig_jax.sampling.sampler import Sampler
from dig_jax.training.compile import abstract_batch, compile_train_step
from dig_jax.training.hooks import draw_grid, make_hooks, try_to_write_report
from dig_jax.training.loop import loop
from dig_jax.training.objectives.auxiliary import Frozen
from dig_jax.training.restore import first_state
from dig_jax.training.run import Run
from dig_jax.training.state import State, abstract_state
from dig_jax.training.telemetry.profiler import ProfiledSteps
from dig_jax.training.telemetry.starts import note_start
from dig_jax.training.telemetry.step_meter import StepMeter
from dig_jax.training.telemetry.utilization import best_times
from dig_jax.training.telemetry.wandb import WandbRun, require_wandb
from dig_jax.training.telemetry.writer import MetricWriter
from dig_jax.training.workdir import claim_workdir

log = logging.getLogger(__name__)


def train(
    settings: Config,
    workdir: Path,
    profile: ProfiledSteps | None = None,
    features: Features | None = None,
) -> dict[str, Any] | None:
    """Start or resume training until `settings.training.steps`, then draw and score samples.

    At SIGTERM, or at a cloud's preemption notice, the run finishes the step, saves and returns.

    Args:
        settings: the run's config, which must match an existing workdir's.
        workdir: the run's directory.
        profile: the steps to trace into WORKDIR/profile.
        features: the encoder for `auxiliary.repa_weight`, as in `Components`.

    Returns:
        The scores, as in scores.json; None if the run was preempted before the last step.

    Raises:
        UserError: invalid settings, a workdir that is in use or has different settings, or no intact
            checkpoint.
    """
    began, steps = time.monotonic(), settings.training.steps
    check_agreement({"workdir": str(absolute(workdir)), **config.flattened(config_and_versions(settings))})
    mesh = make_mesh(settings.mesh, settings.data.batch_size, settings.training.accumulation)
    components = Components(settings, features=features)
    _check_settings(components)
    _check_workdir(workdir, components)
    check_agreement({"data": components.train_source.fingerprint})
    abstract = abstract_state(components, mesh)
    _check_mesh(components, mesh, abstract["params"])
    # Kernels read the mesh from the context: the compiler cannot partition them.
    with (
        claim_workdir(settings, workdir),
        jax.set_mesh(mesh),
        output_folder(workdir) as output,
        Checkpoints(workdir, settings.checkpoint) as checkpoints,
    ):
        run = Run(components, mesh, workdir, output.folder, output.push)
        state, examples = first_state(run, abstract, checkpoints)
        _introduce(run, state)
        with contextlib.closing(_make_writer(run, int(state["step"]))) as writer:
            if int(state["step"]) < steps:
                state = _train(run, state, examples, profile, checkpoints, writer)
            checkpoints.wait()
            if int(state["step"]) < steps:
                log.info("preempted: saved step %d of %d", int(state["step"]), steps)
                return None
            scores = _finish(run, state, writer)
    log.info("finished in %s; the results are in %s", duration(time.monotonic() - began), workdir)
    return scores


def _train(
    run: Run,
    state: State,
    examples: int,
    profile: ProfiledSteps | None,
    checkpoints: Checkpoints,
    writer: MetricWriter,
) -> State:
    distilled = _read_distilled(run)
    offset = examples - int(state["step"]) * run.settings.data.batch_size
    compiled: dict[tuple[int, ...], jax.stages.Compiled] = {
        shape: compile_train_step(run.components, run.mesh, state, distilled, shape, offset)
        for shape in run.components.training_shapes
    }
    bounds = best_times(run.components, run.mesh, next(iter(compiled.values())))
    meter = StepMeter(run.settings.data.batch_size)
    hooks = make_hooks(run, int(state["step"]), profile, checkpoints, writer, meter, bounds)
    params = distilled[1:] if distilled else ()
    return loop(
        run,
        lambda state, batch: compiled[batch["image"].shape[1:]](state, batch, *params),
        state,
        examples,
        hooks,
        meter,
    )


def _read_distilled(run: Run) -> Frozen | None:
    """Return the model to distill.

    Raises:
        ConfigError: it is unreadable, or was trained on other images or to predict something else.
    """
    settings = run.settings.auxiliary
    if not settings.distill_weight or settings.distill_from is None:
        return None
    with naming_setting("config.auxiliary"):
        return read_frozen_model("distill_from", settings.distill_from, run.components, run.mesh)


def _finish(run: Run, state: State, writer: MetricWriter) -> dict[str, Any]:
    """Draw and score samples of the final state; return the scores."""
    sampler = run.sampler(state)
    draw_grid(sampler, run.output, writer)
    scores = dict(run.score(state))
    draw_neighbors(sampler, run.output)
    try_to_write_report(run.output)
    return scores


def _check_settings(components: Components) -> None:
    """Validate settings that would otherwise fail during the run.

    Raises:
        ConfigError: an invalid setting.
    """
    require_wandb(components.config.logging.wandb)
    check_keep_best(components.config)
    settings, channels = components.config.sampling, components.image_spec.image_shape[2]
    names = (*components.config.training.average_names, "params")
    if components.config.sampled_ema not in names:  # an average that checkpoints give after training
        raise ConfigError(
            f"invalid config.sampling.ema={settings.ema!r} in training; expected {alternatives(names)}"
        )
    source = components.train_source
    if not len(source):
        raise ConfigError(f"config.data: no images in the {source.split!r} split of {source.name!r}")
    # Load components that are first used between steps, so that a failure ends the run before it starts.
    decoder, _, _ = components.autoencoder, components.heldout_source, components.buckets
    if isinstance(source, LatentSource):
        check_latents(source, components.config, decoder.fingerprint() if decoder else None)
    if (features := components.stored_features) is not None:
        with naming_setting("config.auxiliary.repa_features"):
            features.check(source, components.config.data.flip)
    for evaluator in evaluators_for(components.config):
        evaluator.check(components)
    with naming_setting("config.sampling"):
        _ = Sampler(components, {}, step=0).evaluations  # validates samplers and guidance
        if settings.guidance_channels is not None and settings.guidance_channels > channels:
            raise ValueError(
                f"invalid guidance_channels={settings.guidance_channels}; expected at most {channels}, the"
                " number of image channels"
            )


def _check_workdir(workdir: Path, components: Components) -> None:
    """Check that the workdir is not among the images, or its samples would become training images.

    Raises:
        ConfigError: it is.
    """
    for source in (components.train_source, components.heldout_source):
        images = folder(source)
        if (
            images
            and not is_remote(workdir)
            and pathlib.Path(workdir).resolve().is_relative_to(images.resolve())
        ):
            raise ConfigError(
                f"invalid --workdir={workdir}: inside the images in {images}; expected another directory"
            )


def _check_mesh(components: Components, mesh: Mesh, params: Params) -> None:
    """Check that the mesh divides the model's heads and token rows, in all buckets.

    Raises:
        ConfigError: the mesh does not divide them.
    """
    for shape in components.training_shapes:
        batch = abstract_batch(components, mesh, shape)
        with jax.set_mesh(mesh), naming_setting("config.mesh"):
            jax.eval_shape(components.denoise, params, batch["image"], batch["label"], batch["label"])


def _introduce(run: Run, state: State) -> None:
    """Log data, model, devices and the first step; write parameters.txt and a row of starts.jsonl."""
    for line in summary(run.components.train_source, run.components.heldout_source):
        log.info(line)
    if buckets := run.components.buckets:
        log.info("training images by bucket: %s", ", ".join(buckets.counts))
    table = parameter_overview.get_parameter_overview(state["params"], include_stats=False)
    with replacing(run.output / "parameters.txt") as file:
        file.write(f"{table}\n".encode())
    step = int(state["step"])
    note_start(run.output, step)
    run.publish()
    log.info(
        "%s, %.2f M parameters, on %d × %s, %s %s",
        run.settings.model.name,
        param_count(state["params"]) / 1e6,
        run.mesh.size,
        run.mesh.devices.flat[0].device_kind,
        f"resuming after step {step} of {run.settings.training.steps} in" if step else "starting in",
        run.workdir,
    )


def _make_writer(run: Run, first_step: int) -> MetricWriter:
    project, wandb = run.settings.logging.wandb, []
    if project is not None:
        fields = config.to_dict(run.settings)
        on_process_0(lambda: wandb.append(WandbRun(run.output, project=project, settings=fields)))
    return MetricWriter(
        run.output,
        first_step=first_step,
        tensorboard=run.settings.logging.tensorboard,
        wandb=wandb[0] if wandb else None,
    )
