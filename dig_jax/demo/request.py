"""Requests for images: what a demo offers, and checked requests from the fields of a form or of JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from dig_jax.data.class_names import class_index, display_name
from dig_jax.errors import alternatives, suggest

Size = tuple[int, int]
"""(height, width) in pixels."""

_FIELDS = ("class", "seeds", "guidance_scale", "sampler", "steps", "size")


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program depends on: requests with equal programs share batches.

    Attributes:
        sampler: name of the sampler.
        steps: number of steps.
        size: of the images.
        guided: whether the scale of guidance differs from 1.
    """

    sampler: str
    steps: int
    size: Size
    guided: bool


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """A request for one image per seed.

    Attributes:
        label: index of the class; 0 for models without classes.
        seeds: of the images.
        guidance_scale: scale of guidance; 1 is none.
        program: everything else.
    """

    label: int
    seeds: tuple[int, ...]
    guidance_scale: float
    program: Program


@dataclasses.dataclass(frozen=True)
class Menu:
    """What a demo offers. Sampler, steps and size come from short lists, so that few programs are compiled.

    Attributes:
        class_names: names of the classes, in order; empty for models without classes.
        samplers: names of samplers; the first one is the default.
        steps: numbers of steps, increasing.
        default_steps: one of them.
        sizes: image sizes; the first is the default and belongs to the training images.
        trained: how many of them are those of training images.
        default_scale: scale of guidance.
        min_scale: least scale of guidance.
        max_scale: greatest scale of guidance.
        max_images: greatest number of images of a request.
    """

    class_names: tuple[str, ...]
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    default_steps: int
    sizes: tuple[Size, ...]
    trained: int
    default_scale: float
    min_scale: float = 0.0
    max_scale: float = 20.0
    max_images: int = 8

    @property
    def usual_scales(self) -> tuple[float, float]:
        """The least and the greatest scale of guidance of a slider, which shows the default."""
        return min(1.0, self.default_scale), max(min(self.max_scale, 10.0), self.default_scale)

    def read(self, fields: Mapping[str, Any]) -> ImageRequest:
        """Return the request that JSON fields describe.

        Args:
            fields: class (name or index), seeds (integer or list), guidance_scale, sampler, steps, size
                (integer or [height, width]). Only `class` has no default.

        Raises:
            ValueError: a field is unknown or invalid; the message is one sentence.
        """
        for name in fields:
            if name not in _FIELDS:
                expected = ", ".join(_FIELDS)
                raise ValueError(
                    f"unknown field: got {name!r:.80}; expected one of {expected}{suggest(name, _FIELDS)}"
                )
        scale = self._scale(fields.get("guidance_scale", self.default_scale))
        program = Program(
            sampler=_one_of("sampler", fields.get("sampler", self.samplers[0]), self.samplers),
            steps=_one_of("steps", fields.get("steps", self.default_steps), self.steps),
            size=self._size(fields.get("size", self.sizes[0])),
            guided=scale != 1,
        )
        return ImageRequest(self._label(fields), self._seeds(fields.get("seeds", 0)), scale, program)

    def describe(self, request: ImageRequest) -> dict[str, Any]:
        """Return fields from which `read` makes an equal request."""
        program = request.program
        return {
            **({"class": request.label} if self.class_names else {}),
            "seeds": list(request.seeds),
            "guidance_scale": request.guidance_scale,
            "sampler": program.sampler,
            "steps": program.steps,
            "size": _plain_size(program.size),
        }

    def to_json(self) -> dict[str, Any]:
        """Return what is on offer as JSON."""
        defaults = self.read({"class": 0} if self.class_names else {})
        fields = {name: value for name, value in self.describe(defaults).items() if name != "class"}
        return {
            "classes": [display_name(name) for name in self.class_names],
            "samplers": list(self.samplers),
            "steps": list(self.steps),
            "sizes": [_plain_size(size) for size in self.sizes],
            "trained_sizes": [_plain_size(size) for size in self.sizes[: self.trained]],
            "min_guidance_scale": self.min_scale,
            "max_guidance_scale": self.max_scale,
            "max_images": self.max_images,
            "defaults": fields,
        }

    def _label(self, fields: Mapping[str, Any]) -> int:
        count = len(self.class_names)
        if not count:
            if "class" in fields:
                raise ValueError("unexpected class: the model has no classes")
            return 0
        label = fields.get("class")
        if isinstance(label, str) and len(label) <= 200:
            return class_index(label, self.class_names)
        if not _is_integer(label) or not 0 <= label < count:
            got = "no class" if label is None else f"class {label!r:.80}"
            raise ValueError(f"invalid class: got {got}; expected a name or an index from 0 to {count - 1}")
        return label

    def _seeds(self, seeds: Any) -> tuple[int, ...]:
        listed = [seeds] if _is_integer(seeds) else seeds
        valid = isinstance(listed, list) and all(_is_integer(seed) and 0 <= seed < 2**31 for seed in listed)
        if not valid or not 1 <= len(listed) <= self.max_images:
            raise ValueError(
                f"invalid seeds: got {seeds!r:.80}; expected 1 to {self.max_images} integers from 0 to"
                f" {2**31 - 1}"
            )
        return tuple(listed)

    def _scale(self, scale: Any) -> float:
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not is_number or not self.min_scale <= scale <= self.max_scale:
            raise ValueError(
                f"invalid guidance_scale: got {scale!r:.80}; expected a number from {self.min_scale:g} to"
                f" {self.max_scale:g}"
            )
        return float(scale)

    def _size(self, size: Any) -> Size:
        pair = (size, size) if _is_integer(size) else tuple(size) if isinstance(size, list) else size
        if pair not in self.sizes:
            shown = alternatives([str(_plain_size(size)) for size in self.sizes])
            raise ValueError(f"invalid size: got {size!r:.80}; expected {shown}")
        return pair


def _plain_size(size: Size) -> int | list[int]:
    """Return a size as a request may have it."""
    return size[0] if size[0] == size[1] else list(size)


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return a value that is one of the choices and has their type."""
    if type(value) is not type(choices[0]) or value not in choices:
        hint = suggest(value, choices) if isinstance(value, str) and isinstance(choices[0], str) else ""
        expected = alternatives([str(choice) for choice in choices])
        raise ValueError(f"invalid {name}: got {value!r:.80}; expected {expected}{hint}")
    return value
