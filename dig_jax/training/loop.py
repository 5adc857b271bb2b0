"""The training loop."""

import contextlib
from collections.abc import Callable, Sequence

import jax

from dig_jax.errors import StalledRead
from dig_jax.parallel import to_global
from dig_jax.training.batch_reader import BatchReader
from dig_jax.training.hooks import Hook, StepEvent
from dig_jax.training.objectives.denoising import Batch, Metrics
from dig_jax.training.preemption import preemption_notice
from dig_jax.training.run import Run
from dig_jax.training.state import State
from dig_jax.training.telemetry.step_meter import StepMeter

TrainStep = Callable[[State, Batch], tuple[State, Metrics]]


def loop(
    run: Run,
    train_step: TrainStep,
    state: State,
    examples: int,
    hooks: Sequence[Hook],
    meter: StepMeter,
) -> State:
    """Train until the last step or a preemption, and call the hooks between steps.

    While a step runs, the next batch is transferred and the next step is dispatched: at most two steps are in
    flight. Only hooks wait for the step that runs, and they pause the meter.

    Args:
        run: the run.
        train_step: the compiled step, which donates its state.
        state: the state to start from.
        examples: the number of training examples consumed so far.
        hooks: called in this order.
        meter: measures the steps.

    Returns:
        The state after the last step.

    Raises:
        StalledRead: the process must exit and the next batch does not arrive. The last step is saved.
    """
    first, last = int(state["step"]), run.settings.training.steps
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(contextlib.closing(run.batches(first, examples)))
        is_preempted = stack.enter_context(preemption_notice())
        # Several processes save the same step, on which one that waits cannot agree with the others.
        must_exit = (lambda: is_preempted(first)) if jax.process_count() == 1 else lambda: False
        reader = stack.enter_context(contextlib.closing(BatchReader(data, must_exit)))
        for hook in hooks:
            stack.callback(hook.close)
        batch = _next_batch(run, reader, meter)
        if batch is None:
            raise StalledRead(
                "stopped while waiting for the first batch; run the same command again to resume"
            )
        for step in range(first + 1, last + 1):
            for hook in hooks:
                hook.before_step(step)
            # An implicit transfer would wait for the running step, or copy the same array at every step.
            with jax.profiler.StepTraceAnnotation("train", step_num=step), jax.transfer_guard("disallow"):
                state, metrics = train_step(state, batch)
            if step < last:
                batch = _next_batch(run, reader, meter)
            meter.add(step, metrics)
            consumed = examples + (step - first) * run.settings.data.batch_size
            stalled = batch is None
            event = StepEvent(
                step,
                state,
                last=last,
                examples=consumed,
                preempted=is_preempted(step) or stalled,
                stalled=stalled,
                must_exit=must_exit,
            )
            for hook in hooks:
                hook.after_step(event)
            if batch is None or event.stalled:
                raise StalledRead(
                    f"stopped while waiting for a batch, after saving step {step} of {last}; run the same"
                    " command again to resume"
                )
            if event.preempted:
                break
    return state


def _next_batch(run: Run, reader: BatchReader, meter: StepMeter) -> Batch | None:
    """Wait for the next batch and start its transfer to the devices; None: see `BatchReader.read`."""
    with meter.waiting_for_data():
        batch = reader.read()
    return None if batch is None else to_global(batch, run.mesh)
