"""Lookup of classes by name, with WordNet's words for the classes of ImageNet."""

import difflib
import functools
import importlib.resources
from collections.abc import Mapping, Sequence

# Suggestions for an unknown name.
_SUGGESTIONS = 3


def imagenet_ids() -> tuple[str, ...]:
    """Return the WordNet ids of the ImageNet-1k classes, in order."""
    return tuple(_lemmas())


def class_index(name: str, class_names: Sequence[str]) -> int:
    """Return the index of a class by name. An equal name wins over one that ignores case, "_" and "-".

    Args:
        name: the class name. If a class name is a comma-separated list or a WordNet id, any one of its names,
            such as "golden retriever" for n02099601, unless it is the whole name of another class.
        class_names: names of all classes, in order.

    Raises:
        ValueError: an unknown name, with suggestions, or an ambiguous one.
    """
    indices = _candidates(name, tuple(class_names))
    if len(indices) > 1:
        choices = " or ".join(f"{index} ({_full_name(class_names[index])})" for index in indices)
        raise ValueError(f"ambiguous class {name!r}; expected an index: {choices}")
    if not indices:
        raise ValueError(f"unknown class {name!r}{_hint(name, class_names)}")
    return indices[0]


def match_classes(class_names: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Return for each class the index of the one class in `known` that shares a name; None without one."""
    matches: list[int | None] = []
    for class_name in class_names:
        found = (_candidates(name, tuple(known)) for name in (class_name, *all_names(class_name)))
        indices = next(filter(None, found), ())
        matches.append(indices[0] if len(indices) == 1 else None)
    return matches


def are_names(class_names: Sequence[str]) -> bool:
    """Return whether classes have names, and not only their numbers."""
    return tuple(class_names) != tuple(map(str, range(len(class_names))))


def display_name(class_name: str) -> str:
    """Return the first name of a class, for the titles of images; a WordNet id is replaced by its words."""
    return all_names(class_name)[0]


def all_names(class_name: str) -> Sequence[str]:
    """Return the names of a class whose name is a WordNet id or a comma-separated list."""
    return _lemmas().get(class_name) or class_name.split(", ")


@functools.cache
def _lemmas() -> Mapping[str, tuple[str, ...]]:
    """Return the words for ImageNet's classes by WordNet id."""
    text = (importlib.resources.files("dig_jax.data") / "imagenet_classes.txt").read_text("utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return {wordnet_id: tuple(lemmas.split(", ")) for wordnet_id, lemmas in rows}


def _candidates(name: str, class_names: tuple[str, ...]) -> Sequence[int]:
    """Return the classes with an equal name; else with one equal but for case; else with it as an alias."""
    equal, whole, aliases = _tables(class_names)
    return equal.get(name) or whole.get(_plain(name)) or aliases.get(_plain(name)) or ()


@functools.lru_cache(maxsize=8)
def _tables(class_names: tuple[str, ...]) -> tuple[dict[str, list[int]], ...]:
    """Return indices by name, by name without case and punctuation, and by each of a class's names."""
    equal, whole, aliases = {}, {}, {}
    for index, class_name in enumerate(class_names):
        equal.setdefault(class_name, []).append(index)
        whole.setdefault(_plain(class_name), []).append(index)
        for alias in dict.fromkeys(map(_plain, (class_name, *all_names(class_name)))):
            aliases.setdefault(alias, []).append(index)
    return equal, whole, aliases


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _full_name(class_name: str) -> str:
    """Return all names of a class, after its id if it has one."""
    names = ", ".join(all_names(class_name))
    return names if names == class_name else f"{class_name}: {names}"


def _hint(name: str, class_names: Sequence[str]) -> str:
    """Return suggestions: names that contain all words of this one, else names with similar spelling."""
    if not class_names:
        return ": the model has no classes"
    spelling = {_plain(alias): alias for class_name in class_names for alias in all_names(class_name)}
    words = set(_plain(name).split())
    near = [plain for plain in spelling if words and words <= set(plain.split())]
    for count, cutoff in ((_SUGGESTIONS, 0.7), (1, 0.6)):
        near = near or difflib.get_close_matches(_plain(name), spelling, count, cutoff)
    if not near:
        return f"; expected {', '.join(class_names)}" if len(class_names) <= 10 else ""
    return f"; did you mean {' or '.join(repr(spelling[plain]) for plain in near[:_SUGGESTIONS])}?"
