"""Classes by name: as the data call them, and ImageNet's as people do."""

import difflib
import functools
import importlib.resources
from collections.abc import Mapping, Sequence

# Names that an unknown one is answered with.
_SHOWN = 3


def imagenet_ids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet-1k's classes in their order, which is that of the ids."""
    return tuple(_lemmas())


def class_index(name: str, class_names: Sequence[str]) -> int:
    """The index of the class that people mean by a name; case, "_" and "-" do not matter.

    Args:
        name: that of the data; or, where they call a class by its WordNet id or by several names with commas
            between them, one of these: "golden retriever" is n02099601.
        class_names: of all classes, in order.

    Raises:
        ValueError: it is none, and says which are near; or it is that of several.
    """
    known: dict[str, dict[int, None]] = {}  # indices by name, each once
    for index, class_name in enumerate(class_names):
        for alias in (class_name, *_names(class_name)):
            known.setdefault(_plain(alias), {})[index] = None
    indices = list(known.get(_plain(name), ()))
    if len(indices) > 1:
        several = " or ".join(f"{index} ({_told(class_names[index])})" for index in indices)
        raise ValueError(f"{name!r} is the name of several classes; say which by its index: {several}")
    if not indices:
        raise ValueError(f"there is no class {name!r}{_hint(name, class_names)}")
    return indices[0]


def display_name(class_name: str) -> str:
    """The first of a class's names, in words where the data have a WordNet id: for the titles of pictures."""
    return _names(class_name)[0]


@functools.cache
def _lemmas() -> Mapping[str, tuple[str, ...]]:
    """ImageNet's classes by WordNet id."""
    text = (importlib.resources.files(__package__) / "imagenet_classes.txt").read_text("utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return {wordnet_id: tuple(lemmas.split(", ")) for wordnet_id, lemmas in rows}


def _names(class_name: str) -> Sequence[str]:
    return _lemmas().get(class_name) or class_name.split(", ")


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _told(class_name: str) -> str:
    """All names of a class, and its id if it has one."""
    names = ", ".join(_names(class_name))
    return names if names == class_name else f"{class_name}: {names}"


def _hint(name: str, class_names: Sequence[str]) -> str:
    """The names that have all words of this one, or else those that are spelt most like it."""
    if not class_names:
        return ": the model has no classes"
    spelt = {_plain(alias): alias for class_name in class_names for alias in _names(class_name)}
    words = set(_plain(name).split())
    near = [plain for plain in spelt if words and words <= set(plain.split())]
    near = near or difflib.get_close_matches(_plain(name), spelt, _SHOWN, cutoff=0.7)
    near = near or difflib.get_close_matches(_plain(name), spelt, 1, cutoff=0.6)
    if not near:
        return f"; they are {', '.join(class_names)}" if len(class_names) <= 10 else ""
    return f"; did you mean {' or '.join(repr(spelt[plain]) for plain in near[:_SHOWN])}?"
