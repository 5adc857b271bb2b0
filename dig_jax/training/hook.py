"""The interface of a hook, and the event that it is called with."""

import dataclasses
from collections.abc import Callable

from dig_jax.training.state import State


@dataclasses.dataclass
class StepEvent:
    """A step that was dispatched and may still be running.

    Attributes:
        step: its number, from 1.
        state: the state after it.
        last: the number of the run's last step.
        examples: the number of training examples consumed, this step's included.
        preempted: whether the process must exit after this step.
        stalled: whether it must exit while a read hangs.
        must_exit: function that asks again whether the process must exit, during a hook that takes long.
        heldout_loss: the held-out loss after this step, once a hook has computed it.
        scores: figures of generated images by name, once a hook has computed them.
        has_new_files: whether a hook saved a checkpoint or drew samples after this step.
    """

    step: int
    state: State
    last: int
    examples: int
    preempted: bool = False
    stalled: bool = False
    must_exit: Callable[[], bool] = lambda: False
    heldout_loss: float | None = None
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    has_new_files: bool = False

    @property
    def ends_loop(self) -> bool:
        """Whether no step follows in this start."""
        return self.preempted or self.step == self.last

    def is_due(self, every_steps: int | None) -> bool:
        """Return whether an action every N steps and at the last step is due; None: never."""
        return every_steps is not None and (self.step % every_steps == 0 or self.step == self.last)

    def metric(self, name: str, *, higher_is_better: bool) -> float | None:
        """Return a figure by which checkpoints are compared, lower is better; None if it was not computed."""
        value = self.heldout_loss if name == "heldout_loss" else self.scores.get(name)
        return -value if value is not None and higher_is_better else value


class Hook:
    """A hook that does nothing. The loop calls all hooks, on all processes."""

    def before_step(self, step: int) -> None:
        """Called before a step is dispatched; the previous step may still be running."""

    def after_step(self, event: StepEvent) -> None:
        """Called when a step and the transfer of the next batch were dispatched."""

    def close(self) -> None:
        """Called when the loop ends, also by an exception."""
