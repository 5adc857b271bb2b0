"""What a run trains on, in a few lines for its start."""

from dig_jax.data.class_names import display_name
from dig_jax.data.source import Source

_SHOWN = 5


def summary(train: Source, heldout: Source) -> list[str]:
    """Return lines with the number of images and classes, and what the sources left out and why."""
    names = [display_name(name) for name in train.class_names[:_SHOWN]]
    names += ["…"] if train.num_classes > _SHOWN else []
    classes = f"{train.num_classes:,} class{'es' if train.num_classes != 1 else ''} ({', '.join(names)})"
    of = f"of {classes}" if names else "without classes"
    held_out = f"{len(heldout):,} held out" if len(heldout) else "none held out"
    height, width, channels = train.image_shape
    lines = [f"{len(train):,} images {of}, {held_out}; {height} × {width}, {channels} channels"]
    if not len(heldout):
        lines.append(
            "without held-out images, logging.heldout_every_steps and checkpoint.keep_best have no effect"
        )
    notes = _notes(train)
    return [*lines, *notes, *(f"held out: {note}" for note in _notes(heldout) if note not in notes)]


def _notes(source: Source) -> tuple[str, ...]:
    """Return the notes of a source; none if it has no such attribute."""
    return getattr(source, "notes", ())
